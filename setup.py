from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.sdist import sdist

HERE = Path(__file__).parent


class SourceDistribution(sdist):
    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        package = [name for name in files if not name.startswith("tests")]  # setuptools adds tests/test*.py by itself
        super().make_release_tree(base_dir, [*package, "requirements.txt"])  # which this file reads


PLOTS = ["ipykernel>=6.29", "matplotlib>=3.8"]
TERMINAL = ["prompt_toolkit>=3.0.53", "rich>=13.7"]
CHAT = ["jinja2>=3.1"]  # for the chat templates of fine-tunes; torch brings it as well
TRITON = ["triton>=3.5; platform_system == 'Linux'"]  # comes with torch for CUDA; its interpreter runs kernels on a CPU
HUB = ["huggingface_hub>=0.26"]
GGUF = ["gguf>=0.17"]  # dequantizes
SERVE = ["starlette>=0.40", "uvicorn>=0.30", "prometheus-client>=0.20"]
CONSTRAINTS = ["llguidance>=1.8"]
EVAL = ["lm_eval>=0.4.13"]
TEST = [
    "pytest>=8", "pytest-xdist>=3.7", "setuptools>=77", "hypothesis>=6.100", "transformers>=4.45", "peft>=0.13",
    "protobuf>=4.21",  # with which transformers reads a tokenizer.model
    "selenium>=4.20",  # drives a browser, where there is one
    "jsonschema>=4.18", "openai>=1.40",
    *PLOTS, *TERMINAL, *HUB, *CHAT, *GGUF, *SERVE, *CONSTRAINTS, *TRITON,
]  # fmt: skip
BENCH = ["llama-cpp-python>=0.3.36", *GGUF, "transformers>=4.56", "matplotlib>=3.8", *SERVE, "aiohttp>=3.9"]

setup(
    cmdclass={"sdist": SourceDistribution},
    name="llama",
    version="0.1.0",  # as in llama/__init__.py
    author="the authors of this repository",
    project_urls={
        "Weights": "https://ai.meta.com/resources/models-and-libraries/llama-downloads/",
        "Licence of the weights": "https://ai.meta.com/llama/license/",
    },
    keywords="llama inference pytorch transformer language-model torchrun quantization openai-api",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 15)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Text Processing :: Linguistic",
        "Typing :: Typed",
    ],
    description="Llama 2 inference, faithful to Meta's release, on any machine and any number of processes",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["llama", "llama.*"]),
    package_data={
        "llama": [
            "py.typed",
            "demo/*.pth",
            "demo/*.json",
            "demo/*.model",
            "demo/README.md",
            "page.html",
            "verification/published.json",
            "layers/*.cpp",
            "layers/*.h",
        ]
    },
    install_requires=(HERE / "requirements.txt").read_text(encoding="utf-8").split(),
    entry_points={
        "console_scripts": ["llama = llama.__main__:main"],
        "lm_eval.models": ["llama = llama.lm_eval_model:LlamaLM"],
    },
    extras_require={
        "terminal": TERMINAL,
        "hub": HUB,
        "chat": CHAT,
        "gguf": GGUF,
        "serve": SERVE,
        "constraints": CONSTRAINTS,
        "eval": EVAL,
        "notebook": [*PLOTS, "notebook>=7"],
        "bench": BENCH,
        "test": TEST,
        "dev": [*TEST, "ruff>=0.6", "mypy>=1.11"],
    },
)
