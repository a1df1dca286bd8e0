"""Canonical rows -> batches of the network: decode, map labels, augment, hand over to the image processor.

The random numbers of a picture depend on the seed, the epoch and its row alone. So batches do not depend on the number
of workers, and a run that is resumed in the middle of an epoch sees what it would have seen.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torchvision import tv_tensors
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as F  # noqa: N812

from .augmentation import Augmentation
from .coco import open_image
from .labels import LabelMap


_CHUNK_BATCHES = 32  # most batches whose pictures are sorted by shape together


def load_image(row: Mapping[str, Any]) -> Image.Image:
    """Decode the picture of a canonical row, turned as its annotations see it.

    The EXIF orientation is applied, as viewers do, unless only the picture as stored has the annotated width and
    height.

    Args:
        row (`Mapping`): A canonical row, or one of `image_id` and `image` alone. Its `image` had better be undecoded
            (`{"bytes", "path"}`), since `datasets` always applies the orientation.

    Returns:
        `PIL.Image.Image`: The RGB picture.

    Raises:
        ValueError: If neither orientation has the annotated size, or the picture is not of 8 bits.
        OSError: If the picture cannot be decoded.
    """
    name = f"{row.get('file_name', 'picture')!r} (image {row['image_id']})"
    try:
        stored = row["image"] if isinstance(row["image"], Image.Image) else open_image(row["image"])
        stored.load()
    except OSError as error:
        raise OSError(f"{name} cannot be read: {error}") from error
    if stored.mode.startswith(("I", "F")):
        raise ValueError(f"{name} has pixels of mode {stored.mode!r}: convert it to 8 bits first")
    image = ImageOps.exif_transpose(stored)
    size = (row.get("width", image.width), row.get("height", image.height))
    if image.size != size:
        image = stored
    if image.size != size:
        raise ValueError(f"{name} is {image.width} x {image.height}, its annotations say {size[0]} x {size[1]}")
    return image.convert("RGB")


def read_image(row: Mapping[str, Any]) -> Tensor:
    """Decode the picture of a canonical row into a tensor, faster than `load_image` where it is a plain JPEG.

    Args:
        row (`Mapping`): A canonical row with its picture undecoded (`{"bytes", "path"}`).

    Returns:
        `Tensor` of shape `(3, height, width)`: The pixels of `load_image`, uint8, in channels-last memory order.

    Raises:
        ValueError: As `load_image` does.
        OSError: As `load_image` does.
    """
    try:
        source = row["image"]
        data = Path(source["path"]).read_bytes() if source["bytes"] is None else source["bytes"]
        with open_image({"bytes": data}) as header:
            is_upright = header.getexif().get(ExifTags.Base.Orientation, 1) == 1
            is_plain = header.format == "JPEG" and header.mode in ("RGB", "L") and is_upright
            if is_plain and header.size == (row["width"], row["height"]):
                return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    except (OSError, RuntimeError):
        pass  # said better below
    return F.pil_to_tensor(load_image(row))


def read_pair(
    row: Mapping[str, Any], label_map: LabelMap, augmentation: Augmentation | None, key: Sequence[int]
) -> tuple[Tensor, dict[str, Any]]:
    """Read a canonical row as a (picture, annotation) pair, augmented.

    Args:
        row (`Mapping`): A canonical row with its picture undecoded.
        label_map (`LabelMap`): From category ids to class labels.
        augmentation (`Augmentation`, *optional*): What `build_augmentation` returns.
        key (`Sequence[int]`): What its random numbers depend on; none is negative.

    Returns:
        `tuple[Tensor, dict]`: As an item of `DetectionDataset`.

    Raises:
        ValueError: As `load_image` does, or if a category is not in the label map.
        OSError: As `load_image` does.
    """
    image = read_image(row)
    objects = [{**item, "category_id": label_map.label(item["category_id"])} for item in row["objects"]]
    if augmentation is not None:
        with _random_state(*key):
            image, target = augmentation(image, _target(objects, (image.shape[-2], image.shape[-1])))
        objects = _objects(target)
    return image, {"image_id": row["image_id"], "annotations": objects}


class DetectionDataset(torch.utils.data.Dataset):
    """Read (picture, annotation) pairs with class labels, ready for the image processor.

    Args:
        dataset (`datasets.Dataset`): Canonical rows.
        label_map (`LabelMap`): From the dataset's category ids to class labels.
        augmentation (`Augmentation`, *optional*): What `build_augmentation` returns.
        seed (`int`): Seed of the augmentation.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        label_map: LabelMap,
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        self.dataset = dataset.cast_column("image", datasets.Image(decode=False))
        self.label_map, self.augmentation, self.seed = label_map, augmentation, seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers that outlive an epoch see it change

    def set_epoch(self, epoch: int) -> None:
        """Choose the random numbers of an epoch, also in workers that are running.

        Args:
            epoch (`int`): Number of the epoch.
        """
        self.epoch.fill_(epoch)

    def aspect_ratios(self) -> np.ndarray:
        """Return width / height of every picture, as annotated."""
        return np.asarray(self.dataset["width"]) / np.asarray(self.dataset["height"])

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        """Read one picture.

        Args:
            index (`int`): The row.

        Returns:
            `tuple[Tensor, dict]`: The uint8 picture (3, height, width), and its annotation in COCO form: `image_id`
            and `annotations`, whose `category_id` is the class label and `bbox` xywh in pixels of that picture.
        """
        key = (self.seed, int(self.epoch), index)
        return read_pair(self.dataset[index], self.label_map, self.augmentation, key)


def data_loader(
    dataset: DetectionDataset,
    processor: Callable[..., Mapping[str, Any]],
    batch_size: int,
    *,
    shuffle: bool = True,
    drop_last: bool = False,
    num_workers: int = 0,
    pin_memory: bool = False,
    group_by_aspect_ratio: bool = False,
) -> DataLoader:
    """Build the loader of a training or validation set.

    Call `loader.sampler.set_epoch(epoch)` before each epoch (Accelerate's `loader.set_epoch(epoch)` does): it changes
    the order and the augmentation. Pictures are resized by the processor, unless the augmentation does it.

    Args:
        dataset (`DetectionDataset`): The pictures; its seed is also that of the order.
        processor (`Callable`): The image processor.
        batch_size (`int`): Pictures in a batch.
        shuffle (`bool`): Whether to draw a new order each epoch.
        drop_last (`bool`): Whether to leave out an incomplete last batch.
        num_workers (`int`): Processes that read pictures; 0 reads in this one.
        pin_memory (`bool`): Whether to put batches into pinned memory, for faster copies to a GPU.
        group_by_aspect_ratio (`bool`): Whether to put pictures of like shape into a batch, which then needs little
            padding; the order of batches is random still.

    Returns:
        `DataLoader`: Batches as `collate` returns them.

    Raises:
        ValueError: If pictures are to be grouped but not shuffled.
    """
    if group_by_aspect_ratio and not shuffle:
        raise ValueError("group_by_aspect_ratio is True: it needs shuffle, since it changes the order")
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=EpochSampler(dataset, shuffle, batch_size if group_by_aspect_ratio else 1),
        collate_fn=collate(processor, dataset.augmentation is None or not dataset.augmentation.resizes),
        drop_last=drop_last,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
    )


def collate(
    processor: Callable[..., Mapping[str, Any]], do_resize: bool
) -> Callable[[list[tuple[Tensor, dict[str, Any]]]], dict[str, Any]]:
    """Return the function that makes a batch of (picture, annotation) pairs.

    Args:
        processor (`Callable`): The image processor.
        do_resize (`bool`): Whether it resizes; False after an augmentation that did.

    Returns:
        `Callable`: From a list of pairs to a dict of `pixel_values`, `pixel_mask` and `labels`.
    """
    return partial(_collate, processor, do_resize)


class EpochSampler(Sampler[int]):
    """Draw every row once an epoch, in an order that depends on the dataset's seed and the epoch alone.

    Grouping is a matter of order: cut into runs of `batch_size`, as any batch sampler does, it gives batches of like
    aspect ratio. So whatever shards or skips batches does not need to know.

    Args:
        dataset (`DetectionDataset`): The rows; it is told the epoch too.
        shuffle (`bool`): Whether to shuffle; otherwise rows come in order.
        batch_size (`int`): Rows in a run of like aspect ratio; 1 groups nothing.
    """

    def __init__(self, dataset: DetectionDataset, shuffle: bool, batch_size: int = 1) -> None:
        self.dataset, self.shuffle, self.batch_size = dataset, shuffle, batch_size
        self.aspect_ratios = dataset.aspect_ratios() if batch_size > 1 else None

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the augmentation of an epoch.

        Args:
            epoch (`int`): Number of the epoch.
        """
        self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        """Yield the rows of the epoch."""
        if not self.shuffle:
            return iter(range(len(self)))
        rng = np.random.default_rng([self.dataset.seed, int(self.dataset.epoch)])
        order = rng.permutation(len(self))
        if self.aspect_ratios is not None:
            order = grouped_by_ratio(order, self.aspect_ratios, self.batch_size, rng)
        return iter(order.tolist())


def grouped_by_ratio(order: np.ndarray, ratios: np.ndarray, batch_size: int, rng: np.random.Generator) -> np.ndarray:
    """Sort an order by ratio, a chunk of batches at a time, and shuffle the batches; the incomplete one stays last.

    Chunks are large enough for batches of one shape, and so many that rows meet other rows each epoch.

    Args:
        order (`np.ndarray` of shape `(N,)`): Rows in random order.
        ratios (`np.ndarray` of shape `(M,)`): Width / height by row.
        batch_size (`int`): Rows of a batch.
        rng (`np.random.Generator`): Shuffles the batches.

    Returns:
        `np.ndarray` of shape `(N,)`: The same rows.
    """
    num_batches = len(order) // batch_size
    whole, rest = np.split(order, [num_batches * batch_size])
    chunk = batch_size * max(1, min(_CHUNK_BATCHES, num_batches // 4))
    chunks = np.split(whole, range(chunk, len(whole), chunk))
    batches = np.concatenate([part[np.argsort(ratios[part], kind="stable")] for part in chunks])
    return np.concatenate([rng.permutation(batches.reshape(-1, batch_size)).ravel(), rest])


def _collate(
    processor: Callable[..., Mapping[str, Any]], do_resize: bool, pairs: list[tuple[Tensor, dict[str, Any]]]
) -> dict[str, Any]:
    images, annotations = zip(*pairs, strict=True)
    batch = processor(images=list(images), annotations=list(annotations), do_resize=do_resize, return_tensors="pt")
    return {**batch, "labels": [dict(label) for label in batch["labels"]]}


def _target(objects: list[dict[str, Any]], canvas_size: tuple[int, int]) -> dict[str, Tensor]:
    boxes = torch.tensor([item["bbox"] for item in objects], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=tuple(canvas_size)),
        "labels": torch.tensor([item["category_id"] for item in objects], dtype=torch.int64),
        "area": torch.tensor([item["area"] for item in objects], dtype=torch.float32),
        "iscrowd": torch.tensor([item["iscrowd"] for item in objects], dtype=torch.int64),
        "ids": torch.tensor([item["id"] for item in objects], dtype=torch.int64),
    }


def _objects(target: dict[str, Tensor]) -> list[dict[str, Any]]:
    boxes = target["boxes"].as_subclass(Tensor).clone()
    boxes[:, 2:] -= boxes[:, :2]
    columns = (boxes, *(target[key] for key in ("labels", "area", "iscrowd", "ids")))
    keys = ("bbox", "category_id", "area", "iscrowd", "id")
    return [dict(zip(keys, values, strict=True)) for values in zip(*(c.tolist() for c in columns), strict=True)]


@contextmanager
def _random_state(*key: int) -> Iterator[None]:
    """Seed torch, numpy and random from a key, and put their states back afterwards."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
