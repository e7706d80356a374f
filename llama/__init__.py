"""Llama 2 inference: Meta's names and numbers, on any machine and any number of processes."""

from .generation import Dialog, Llama
from .model import ModelArgs, Transformer
from .tokenizer import Tokenizer

__all__ = ["Dialog", "Llama", "ModelArgs", "Tokenizer", "Transformer"]
__version__ = "0.0.1"
