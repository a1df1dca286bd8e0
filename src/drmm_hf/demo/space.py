"""The demo as a folder that a Hugging Face Space runs as it is."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from importlib.metadata import requires, version
from pathlib import Path

from ..conversion.new_folder import new_folder


# What makes a model of a folder; states of training stay where they are.
_MODEL_FILES = (
    "config.json",
    "preprocessor_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
)


def write_space(models: Sequence[str], output: str | Path) -> None:
    """Write the folder of a Space: the page, this package, what they need, and the models that lie on this disk.

    Args:
        models (`Sequence[str]`): Detectors to show side by side. Folders are copied, ids are fetched by the Space.
        output (`str` or `Path`): New folder; push it to a Space of the Gradio kind.

    Raises:
        FileExistsError: If `output` holds something.
    """
    with new_folder(output) as folder:
        package = Path(__file__).parents[1]
        shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(Path(__file__).with_name("app.py"), folder)
        shutil.copy(package.parent / "drmm_onnx.py", folder)
        names = []
        for number, name in enumerate(models, start=1):
            if Path(name).is_dir():
                names.append(f"models/{number}_{re.sub(r'[^A-Za-z0-9._-]+', '_', _short_name(Path(name)))}")
                _copy_model(Path(name), folder / names[-1])
            else:
                names.append(name)
        (folder / "models.json").write_text(json.dumps(names, indent=2) + "\n", encoding="utf-8")
        needed = [one for one in requires("drmm-hf") or [] if "extra ==" not in one]
        lines = [*needed, "matplotlib>=3.8", f"gradio=={version('gradio')}"]
        (folder / "requirements.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(_readme(names), encoding="utf-8")


def _short_name(path: Path) -> str:
    """Name a model by its folder, and that of its run where it is its best or last."""
    path = path.resolve()
    return f"{path.parent.name}_{path.name}" if path.name in ("best", "last") else path.name


def _copy_model(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for pattern in _MODEL_FILES:
        for file in source.glob(pattern):
            shutil.copy(file, target)


def _readme(names: Sequence[str]) -> str:
    """Return the page of the Space; its head is what the Hub reads."""
    models = "".join(f"\n  - {name}" for name in names if not name.startswith("models/"))
    return f"""---
title: D-RMM
sdk: gradio
sdk_version: {version("gradio")}
app_file: app.py
license: apache-2.0{chr(10) + "models:" + models if models else ""}
---

Object detection with D-RMM: boxes, how sure each of their sides is, and the density over boxes.
"""
