"""Predict in parts: spread over processes, written as it goes, continued after a kill, in constant memory.

A part is a run of neighbouring pictures. Pictures share a batch only with others of their part, and parts depend on
nothing but the data and the batch size: whoever predicts them, and whenever, the detections are the same to the bit.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from itertools import chain, count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import ZipFile

import datasets
import pyarrow.compute as pc
import torch
from tqdm import tqdm

from .detections import Detections
from .files import make_folder, whole_file
from .predict import predict


if TYPE_CHECKING:
    from accelerate import PartialState

# Most pictures of a part, and how many parts small data are cut into for the processes to share.
_LARGEST, _NUM_PARTS = 256, 32


def launched_processes(device: str | torch.device | None = None) -> PartialState | None:
    """Return the processes that `accelerate launch` or torchrun started, if this is one of them.

    Args:
        device (`str` or `torch.device`, *optional*): "cpu" to leave GPUs alone.

    Returns:
        `accelerate.PartialState`: With the number of processes and the place of this one; None if it is alone.
    """
    from accelerate import PartialState

    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        return None
    on_cpu = str(device) == "cpu" or not torch.cuda.is_available()  # otherwise accelerate would run each alone
    return PartialState(cpu=on_cpu, timeout=timedelta(days=7))  # they wait for the slowest


def predict_parts(
    model: torch.nn.Module,
    processor: Any,
    dataset: datasets.Dataset | datasets.IterableDataset | Iterable[Mapping[str, Any]],
    images: Sequence[Mapping[str, Any]],
    folder: str | Path | None = None,
    *,
    batch_size: int = 1,
    device: str | torch.device | None = None,
    top_k: int = 100,
    processes: PartialState | None = None,
    progress: bool = True,
) -> Detections | None:
    """Find the objects in every picture of a dataset, part by part.

    With a `folder`, each part is written there when it is done, in one go. A second call for the same model, pictures
    and options reads what is there and goes on; a part that is damaged or says that it is another one is predicted
    again, parts of anything else are removed.

    Args:
        model (`torch.nn.Module`): As in `predict`.
        processor (`Any`): As in `predict`.
        dataset (`Dataset`, `IterableDataset` or `Iterable[Mapping]`): As in `predict`. Of a stream, every process
            reads all rows and decodes the pictures of its own parts.
        images (`Sequence[Mapping]`): COCO's records of the pictures. Their number cuts the parts, and they tell other
            data from these.
        folder (`str` or `Path`, *optional*): Where parts are written.
        batch_size (`int`): As in `predict`.
        device (`str` or `torch.device`, *optional*): As in `predict`.
        top_k (`int`): As in `predict`.
        processes (`accelerate.PartialState`, *optional*): Those that share the work; all call this function, and see
            the same `folder`. None: this one alone.
        progress (`bool`): Whether to say what was found in the folder, and to show a bar.

    Returns:
        `Detections`: One result a picture, in the order of the dataset. None in all but the main process.

    Raises:
        ValueError: As `predict`; if several processes have no folder; if a part of another process is missing; or if
            something else is in the way of a part.
    """
    for name, value in (("batch_size", batch_size), ("top_k", top_k)):
        if value < 1:  # before the parts of other options are removed
            raise ValueError(f"{name} is {value}; the rule is at least 1.")
    rank, world = (0, 1) if processes is None else (processes.process_index, processes.num_processes)
    if world > 1 and folder is None:
        raise ValueError(f"{world} processes share the pictures; the rule is a folder to write their parts to.")
    if isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        dataset = dataset.cast_column("image", datasets.Image(decode=False))
    size, done, image_ids = part_size(len(images), batch_size), set(), None
    if isinstance(dataset, datasets.Dataset):
        image_ids = list(dict.fromkeys(dataset["image_id"]))
    if folder is not None:
        options: dict[str, Any] = {"top_k": top_k, "batch_size": batch_size, "part_size": size}
        options["device"] = torch.device(device or next(model.parameters()).device).type
        folder = Path(folder) / fingerprint(model, processor, dataset, images, options, processes)
        if rank == 0:
            _prepare(folder, size, image_ids, progress)
        if processes is not None:
            processes.wait_for_everyone()
        done = {*_files(folder)}

    mine = [index for index in range(rank, math.ceil(len(images) / size), world) if index not in done]
    total = sum(min(size, len(images) - index * size) for index in mine)
    hidden = None if progress and rank == 0 else True  # None: shown on a terminal
    found, num_parts = {}, 0
    with tqdm(total=total, desc="predicting", unit="image", delay=2, disable=hidden, leave=False) as bar:
        for index, rows in _parts(dataset, size, set(mine), {record["id"] for record in images}):
            num_parts = index + 1
            if rows is not None:
                found[index] = predict(model, processor, _counted(rows, bar), batch_size, device, top_k, False)
            if rows is not None and folder is not None:
                _write(found.pop(index), folder / f"{index:06d}.npz")
    if processes is not None:
        processes.wait_for_everyone()
    if rank > 0:
        return None
    if folder is not None:
        paths = [folder / f"{index:06d}.npz" for index in range(num_parts)]
        lacking = [path for path in paths if not path.exists()]
        if lacking:
            raise ValueError(f"part {lacking[0]} is missing; the rule is one folder that all processes see.")
        found = {index: _read(path) for index, path in enumerate(paths)}
    return Detections.merge(found.values())


def part_size(num_images: int, batch_size: int = 1) -> int:
    """Return the number of pictures of a part: some hundreds, or fewer where there would be too few parts to share.

    Args:
        num_images (`int`): Number of all pictures.
        batch_size (`int`): Largest number of pictures in a batch; a part has room for a few.

    Returns:
        `int`: At least 1.
    """
    return max(4 * batch_size, min(_LARGEST, math.ceil(num_images / _NUM_PARTS)))


def fingerprint(
    model: torch.nn.Module,
    processor: Any,
    dataset: Iterable[Mapping[str, Any]],
    images: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
    processes: PartialState | None = None,
) -> str:
    """Return a digest of all that detections depend on.

    Of the pictures, it sees COCO's records, their order, path, size and time of the last change of each file, and the
    bytes of what is in memory: pictures of the same names in another folder are other pictures. Of a stream that is
    not of local files, as from the Hub, it sees the first picture alone: the others would have to be fetched. Of rows
    that are no dataset, it sees nothing.

    Args:
        model (`torch.nn.Module`): Weights and config count.
        processor (`Any`): Its image processor.
        dataset (`Iterable[Mapping]`): The rows, undecoded.
        images (`Sequence[Mapping]`): COCO's records of the pictures.
        options (`Mapping`): What else counts, for json.
        processes (`accelerate.PartialState`, *optional*): Those that all call this. The main one tells the others the
            times that it sees, as copies of the pictures on several machines may have several.

    Returns:
        `str`: 16 hexadecimal digits.
    """
    digest = hashlib.blake2b(digest_size=8)
    config: Any = getattr(model, "config", None)
    config = config.to_dict() if hasattr(config, "to_dict") else {}
    config.pop("_name_or_path", None)
    content = [
        type(model).__name__,
        config,
        processor.to_dict() if hasattr(processor, "to_dict") else type(processor).__name__,
        [[record.get(name) for name in ("id", "file_name", "width", "height")] for record in images],
        list(dataset["image_id"]) if isinstance(dataset, datasets.Dataset) else None,
        dict(options),
        torch.__version__,
    ]
    digest.update(json.dumps(content, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    stamps = []
    for path, content in _pictures(dataset):
        digest.update(f"{path} {None if content is None else len(content)}".encode())
        digest.update(b"" if content is None else content)
        stamps.append(_stamp(path) if content is None else None)
    if processes is not None:
        from accelerate.utils import broadcast_object_list

        stamps = broadcast_object_list([stamps])[0]
    digest.update(json.dumps(stamps).encode())
    return digest.hexdigest()


def _pictures(dataset: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str | None, Any]]:
    """Yield path and bytes of each picture of a dataset, one of them None; of a stream, as long as they are files."""
    if isinstance(dataset, datasets.Dataset):
        for table in dataset.select_columns(["image"]).with_format("arrow").iter(1000):
            paths, contents = (pc.struct_field(table["image"], name) for name in ("path", "bytes"))
            yield from zip(paths.to_pylist(), (content.as_buffer() for content in contents), strict=True)
    elif isinstance(dataset, datasets.IterableDataset):
        for row in dataset.select_columns(["image"]):
            path, content = row["image"]["path"], row["image"]["bytes"]
            yield path, content
            if content is not None or _stamp(path) is None:
                return


def _stamp(path: str | None) -> list[int] | None:
    """Return size and time of the last change of a file; None for what is none here, such as a file on the Hub."""
    if path is None:
        return None
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return [status.st_size, status.st_mtime_ns]


def remove_parts(folder: str | Path, keep: str | None = None) -> list[Path]:
    """Remove the parts of finished or other runs, and the folders that are empty then. Files of others stay.

    Args:
        folder (`str` or `Path`): As in `predict_parts`.
        keep (`str`, *optional*): Fingerprint of a run whose parts stay.

    Returns:
        `list[Path]`: Folders of the runs whose parts are gone.
    """
    folder = Path(folder)
    runs = [run for run in folder.glob("*") if re.fullmatch(r"[0-9a-f]{16}", run.name) and run.name != keep]
    runs = [run for run in runs if run.is_dir()]
    for run in runs:
        for file in run.iterdir():
            if re.fullmatch(r"\d{6,}\.npz(\.partial)?", file.name):
                file.unlink()
    for place in (*runs, folder):
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()
    return runs


def _prepare(folder: Path, size: int, image_ids: Sequence[int] | None, say: bool) -> None:
    """Make the folder of a run, say what it holds, and remove damaged and strange parts and those of other runs."""
    for other in remove_parts(folder.parent, keep=folder.name):
        if say:
            print(f"{other} holds unfinished work on another model, data or options: starting afresh", flush=True)
    make_folder(folder)
    for index, path in _files(folder).items():
        if path.is_dir():
            raise ValueError(f"{path} is a folder; the rule is a file of detections there: move it away.")
        try:
            _read(path, None if image_ids is None else image_ids[index * size : (index + 1) * size])
        except ValueError as error:
            path.unlink()
            if say:
                print(f"{error}: its pictures are predicted again", flush=True)
    count = len(_files(folder))
    if count and say:
        print(f"going on from {count} parts in {folder}", flush=True)


def _files(folder: Path) -> dict[int, Path]:
    """Return the files of the parts that are there, by number."""
    paths = sorted(path for path in folder.glob("*.npz") if re.fullmatch(r"\d{6,}", path.stem))
    return {int(path.stem): path for path in paths}


def _write(part: Detections, path: Path) -> None:
    """Write a part that is whole or not there at all, and says which part of which run it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial_file:
        part.save_arrays(partial_file)
        with ZipFile(partial_file, "a") as archive:
            archive.comment = _identity(path)


def _read(path: Path, image_ids: Sequence[int] | None = None) -> Detections:
    """Read a part, and refuse one that is not what its place says, or not of these pictures."""
    part = Detections.load_arrays(path)
    with ZipFile(path) as archive:
        if archive.comment != _identity(path):
            raise ValueError(f"{path} is another part, or of another run")
    if image_ids is not None and [*part] != [*image_ids]:
        raise ValueError(f"{path} is of other pictures")
    return part


def _identity(path: Path) -> bytes:
    """Return the fingerprint of a run and the number of a part, as the place of its file has them."""
    return f"{path.parent.name}/{path.stem}".encode()


def _parts(
    dataset: Iterable[Mapping[str, Any]], size: int, wanted: set[int], known: set[int]
) -> Iterator[tuple[int, Iterable[Mapping[str, Any]] | None]]:
    """Yield the number of every part, with its rows if it is wanted. Each picture is in one part, the first time."""
    if isinstance(dataset, datasets.Dataset):
        first: dict[int, int] = {}
        for position, image_id in enumerate(dataset["image_id"]):
            first.setdefault(image_id, position)
        positions = list(first.values())
        for index, start in enumerate(range(0, len(positions), size)):
            yield index, dataset.select(positions[start : start + size]) if index in wanted else None
        return
    rows = _unique(dataset, known)
    for index in count():
        head = list(islice(rows, 1))
        if not head:
            return
        part = chain(head, islice(rows, size - 1))
        yield index, part if index in wanted else None
        deque(part, maxlen=0)


def _unique(rows: Iterable[Mapping[str, Any]], known: set[int]) -> Iterator[Mapping[str, Any]]:
    """Yield rows whose picture was not seen before, and refuse those that nobody annotated."""
    seen = set()
    for row in rows:
        image_id = int(row["image_id"])
        if image_id not in known:
            raise ValueError(f"image_id {image_id} has no entry in the annotations; the rule is one for each picture.")
        if image_id not in seen:
            seen.add(image_id)
            yield row


def _counted(rows: Iterable[Mapping[str, Any]], bar: tqdm) -> Iterator[Mapping[str, Any]]:
    for row in rows:
        yield row
        bar.update()
