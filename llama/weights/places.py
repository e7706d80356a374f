"""Where weights lie: the demo model's folder, and the files of a GGUF model."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..system.files import is_there, listed

DEMO = Path(__file__).parents[1] / "demo"  # the model that comes with the package
DEMO_POSITIONS = 512
PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", flags=re.DOTALL | re.IGNORECASE)
OTHER_WEIGHTS = ("params.json", "consolidated.*.pth", "*.safetensors", "pytorch_model*")


def find_gguf(path: Path) -> list[Path]:
    """The files of the GGUF model at a path, in order: a file, or one of its parts, or a folder with no other weights.

    Empty if there is none. ValueError if the folder has several models, or a part is missing.
    """
    if os.path.isdir(path):
        found = sorted(each for each in path.iterdir() if each.suffix.lower() == ".gguf")
        if not found or any(True for pattern in OTHER_WEIGHTS for _ in path.glob(pattern)):
            return []
        models = {part[1] + part[3] if (part := PART.fullmatch(each.name)) else each.name for each in found}
        if len(models) > 1:
            raise ValueError(
                f"{path} holds several models: {listed(each.name for each in found)}; pass the path of one of them"
            )
        path = found[0]
    elif path.suffix.lower() != ".gguf":
        return []
    if (part := PART.fullmatch(path.name)) is None:
        return [path]
    paths = [path.with_name(f"{part[1]}-{i:05d}-of-{part[3]}{path.suffix}") for i in range(1, int(part[3]) + 1)]
    if missing := [each.name for each in paths if not is_there(each)]:
        raise ValueError(
            f"{path} is one of {int(part[3])} parts, and {listed(missing)} is missing beside it; download it again"
        )
    return paths or [path]


def check_place(path: Path) -> None:
    """ValueError if no model can be at a path: it is no folder, and no GGUF file."""
    if not find_gguf(path) and not os.path.isdir(path):
        told = ", which is a file" if os.path.isfile(path) else ""
        raise ValueError(
            f"no checkpoint folder at {path}{told}; pass the folder that holds consolidated.00.pth and params.json, or "
            "config.json and model.safetensors, or a GGUF file"
        )
