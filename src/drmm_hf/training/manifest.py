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

from ..evaluation.files import read_json, write_text


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
    write_text(path, json.dumps([*read_manifest(path), record], indent=2) + "\n")


def read_manifest(path: str | Path) -> list[dict[str, Any]]:
    """Read the records of a run; a damaged file is moved to `<name>.damaged`, and a line says so.

    Args:
        path (`str` or `Path`): The file.

    Returns:
        `list[dict]`: A record for each start; empty if there is no file, or a damaged one.
    """
    path = Path(path)
    if not path.is_file():
        return []
    try:
        records = read_json(path)
    except ValueError:
        records = None
    if isinstance(records, list) and all(map(_is_record, records)):
        return records
    aside = path.with_name(path.name + ".damaged")
    os.replace(path, aside)
    print(f"warning: {path} is damaged: moved to {aside.name}; whether the data are those of before is not known")
    return []


def _is_record(record: Any) -> bool:
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        return False
    data = record.get("data", {})
    return isinstance(data, dict) and all(isinstance(one, dict) and "sha256" in one for one in data.values())


def data_changes(records: list[dict[str, Any]], step: int, data: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Compare the data of a run with those that it had when a checkpoint was saved.

    Args:
        records (`list[dict]`): From `read_manifest`.
        step (`int`): Of the checkpoint. The last start before this step saved it; later ones may have saved nothing.
        data (`dict`): `data_fingerprint` of each split now.

    Returns:
        `dict[str, str]`: For each split that changed, what it was and is.
    """
    starts = [record for record in records if record["step"] < step]
    before = starts[-1].get("data", {}) if starts else {}
    lines = {}
    for split in data.keys() & before.keys():
        if data[split]["sha256"] != before[split]["sha256"]:
            was, now = _counts(before[split]), _counts(data[split])
            words = f"{now} as before, with other names, sizes, boxes or classes"
            lines[split] = f"{split} data changed: {words if was == now else f'{was} before, {now} now'}"
    return lines


def _counts(fingerprint: dict[str, Any]) -> str:
    if "num_shards" in fingerprint:
        return f"{fingerprint['num_shards']} shards"
    return f"{fingerprint.get('num_images')} pictures with {fingerprint.get('num_objects')} objects"


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
