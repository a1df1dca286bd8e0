"""What a run was made of: versions, command, data, machine, revision; enough to repeat it from its folder."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import torch

from ..evaluation.files import write_text


PACKAGES = (
    "drmm-hf",
    "torch",
    "torchvision",
    "transformers",
    "datasets",
    "accelerate",
    "timm",
    "pycocotools",
    "safetensors",
    "numpy",
)


def add_to_manifest(path: str | Path, **entries: Any) -> None:
    """Add this start of a run to its manifest, a json list with one record for each time that it was started.

    Args:
        path (`str` or `Path`): The file; what is in it stays.
        entries (`Any`): What the caller knows: step, data, processes.
    """
    path = Path(path)
    record = {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "working_directory": os.getcwd(),
        "versions": versions(),
        "git": git_revision(),
        "machine": {
            "platform": platform.platform(),
            "processors": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        },
        **entries,
    }
    records = json.loads(path.read_text()) if path.is_file() else []
    write_text(path, json.dumps([*records, record], indent=2) + "\n")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that figures may depend on, those installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_revision(folder: str | Path = ".") -> dict[str, Any] | None:
    """Return the commit that a folder stands at.

    Args:
        folder (`str` or `Path`): Any folder.

    Returns:
        `dict` or None: `revision`, and `changed`: whether tracked files differ from it; None outside a repository or
        without git.
    """
    try:
        revision, changes = (
            subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, check=True).stdout
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"revision": revision.strip(), "changed": bool(changes.strip())}


def data_fingerprint(dataset: datasets.Dataset | datasets.IterableDataset) -> dict[str, Any]:
    """Identify a canonical dataset by its annotations, a stream by its categories and the number of its shards.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): Rows with `drmm_hf.data.coco.FEATURES`.

    Returns:
        `dict`: `num_images`, `num_objects` and `sha256` of everything but the pixels: ids, file names, sizes, boxes,
        classes and their names, in order. Of a stream `num_shards` and the `sha256` of its description.
    """
    if isinstance(dataset, datasets.IterableDataset):
        sha256 = hashlib.sha256(dataset.info.description.encode()).hexdigest()
        return {"num_shards": dataset.num_shards, "sha256": sha256}
    digest, num_objects = hashlib.sha256(dataset.info.description.encode()), 0
    for table in dataset.remove_columns("image").with_format("arrow").iter(4096):
        num_objects += sum(len(objects) for objects in table["objects"])
        sink = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(sink, table.schema.remove_metadata()) as stream:
            stream.write_table(table.combine_chunks().replace_schema_metadata())
        digest.update(sink.getvalue())
    return {"num_images": len(dataset), "num_objects": num_objects, "sha256": digest.hexdigest()}
