"""Canonical rows that stream by -> batches of the network, from a position that a checkpoint can keep.

Each process has its share of the shards, or of the rows of every shard where the shards do not divide by the
processes. A worker reads its shards one after another into blocks of rows, undecoded, and shuffles each block as a
whole. So a position is where a block starts, which `datasets` can return to, how many of its rows were taken, and what
their order depends on: to resume is to read one block again, without decoding what was taken, and no row is lost or
comes twice, whatever the sizes and the seed of the loader that goes on. A buffer whose rows are replaced one by one,
as that of `datasets`, would mix rows a little further, but no position short of the epoch's start would restore it.

The random numbers of a picture depend on the seed, the epoch and its id alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from itertools import islice
from typing import Any

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from .augmentation import Augmentation
from .labels import LabelMap
from .loading import collate, grouped_by_ratio, read_pair
from .pictures import inspect_picture
from .problems import Problems


class StreamLoader:
    """Iterate over the batches of a stream, the rest of the epoch in progress at a time.

    Args:
        stream (`datasets.IterableDataset`): Canonical rows, from `load_detection_dataset`.
        label_map (`LabelMap`): From category ids to class labels.
        processor (`Callable`): The image processor.
        batch_size (`int`): Pictures in a batch; the last ones of a worker may be fewer.
        augmentation (`Augmentation`, *optional*): What `build_augmentation` returns.
        seed (`int`): Seed of order and augmentation.
        shuffle_buffer (`int`): Rows of a block, rounded up to whole batches.
        group_by_aspect_ratio (`bool`): Whether to put pictures of like shape in a block into a batch.
        num_workers (`int`): Processes that read; 0 reads in this one. More than there are shards are idle.
        pin_memory (`bool`): Whether to put batches into pinned memory.
        worker_init_fn (`Callable`, *optional*): Called with its number in each worker.
        rank (`int`): Number of this training process.
        num_ranks (`int`): Training processes.
        problems (`Problems`, *optional*): That of `load_detection_dataset`, if bad rows are to be left out: pictures
            that cannot be decoded are then left out too, and `left_out` counts both. By default they are an error.
    """

    def __init__(
        self,
        stream: datasets.IterableDataset,
        label_map: LabelMap,
        processor: Callable[..., Mapping[str, Any]],
        batch_size: int,
        *,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        shuffle_buffer: int = 1000,
        group_by_aspect_ratio: bool = False,
        num_workers: int = 0,
        pin_memory: bool = False,
        worker_init_fn: Callable[[int], None] | None = None,
        rank: int = 0,
        num_ranks: int = 1,
        problems: Problems | None = None,
    ) -> None:
        self.stream = stream.cast_column("image", datasets.Image(decode=False))
        self.label_map, self.augmentation, self.seed = label_map, augmentation, seed
        self.batch_size, self.group_by_aspect_ratio = batch_size, group_by_aspect_ratio
        self.block_size = -(-shuffle_buffer // batch_size) * batch_size
        self.collate = collate(processor, augmentation is None or not augmentation.resizes)
        self.num_workers, self.pin_memory, self.worker_init_fn = num_workers, pin_memory, worker_init_fn
        self.rank, self.num_ranks, self.problems = rank, num_ranks, problems
        self.splits_shards = stream.num_shards % num_ranks == 0
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch.

        Args:
            epoch (`int`): Number of the epoch; changes order and augmentation.
        """
        start = {"shard": 0, "rows": None, "block": 0, "taken": 0}
        shards = self.stream.num_shards // (self.num_ranks if self.splits_shards else 1)
        lanes = [dict(start) for _ in range(min(max(1, self.num_workers), shards))]
        together = self.batch_size if self.group_by_aspect_ratio else 1  # rows of like shape
        order = {"seed": self.seed, "block_size": self.block_size, "together": together}
        self.position: dict[str, Any] = {"epoch": epoch, "order": order, "next": 0, "lanes": lanes, "left_out": {}}

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch that was handed out: numbers, texts, lists and dicts."""
        return deepcopy(self.position)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position.

        The batches that follow are those that would have followed, with any number of workers that divides the one
        that it was saved with; with others they are the same in another order. To the end of the epoch, seed, blocks
        and grouping are those of the position; another batch size cuts the same order of pictures.

        Args:
            state (`dict`): From `state_dict` of a loader with the same stream.

        Raises:
            ValueError: If it is no position of this version.
        """
        if not isinstance(state, dict) or self.position.keys() != state.keys():
            keys = ", ".join(self.position)
            raise ValueError(
                f"the position in the stream is {state!r:.80}; it must have {keys}. After a position of an "
                "earlier version the epoch cannot go on: start the run anew, or from its last model with init_from."
            )
        self.position = deepcopy(state)

    @property
    def left_out(self) -> dict[str, dict[str, Any]]:
        """What was left out of the epoch so far, as `Problems.found`."""
        return self.position["left_out"]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the rest of the epoch in batches, as `collate` returns them."""
        loader = DataLoader(
            _Lanes(self, self.state_dict()),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            worker_init_fn=self.worker_init_fn,
            generator=torch.Generator(),  # its own: starting an epoch must not draw from the model's
        )
        lanes = self.position["lanes"]
        for number, state, found, batch in filter(None, loader):
            lanes[number], self.position["next"] = state, (number + 1) % len(lanes)
            total = Problems(found=self.position["left_out"])
            total.merge(found)
            if batch is not None:
                yield batch


class _Lanes(torch.utils.data.IterableDataset):
    """The half of a loader that runs in a worker.

    A lane is what one worker reads. Lanes take turns, and one that is at its end gives None, so that batches come in
    one order from as many workers as there are lanes, from fewer, and from none.
    """

    def __init__(self, loader: StreamLoader, position: dict[str, Any]) -> None:
        self.loader, self.position = loader, position

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any], dict[str, Any], dict[str, Any] | None] | None]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        count = len(self.position["lanes"])
        turns = [(self.position["next"] + turn) % count for turn in range(first, count, step)]
        lanes = {number: self._lane(number) for number in turns}
        while lanes:
            for number in turns:
                item = next(lanes[number], None) if number in lanes else None
                if item is None:
                    lanes.pop(number, None)
                yield None if item is None else (number, *item)

    def _lane(self, number: int) -> Iterator[tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]]:
        """Yield batches, each with the position after it and what was left out since the one before."""
        size, start = self.loader.batch_size, self.position["lanes"][number]
        reader = _Rows(self.loader, self.position, number)
        rows, block, taken = iter(reader), start["block"], start["taken"]
        while True:
            start = {**reader.state(), "block": block}
            pending = self._shuffled(list(islice(rows, self.position["order"]["block_size"])), number, block)
            found = self._found()
            if taken:  # it was counted with the first batch
                found = {}
            if not pending:
                yield {**reader.state(), "block": block, "taken": 0}, found, None
                return
            del pending[:taken]
            while pending:
                batch, taken = self._batch(pending[:size]), taken + len(pending[:size])
                del pending[:size]
                total = Problems(found=found)
                total.merge(self._found())
                yield {**start, "taken": taken}, total.found, batch
                found = {}
            block, taken = block + 1, 0

    def _shuffled(self, rows: list[dict[str, Any]], lane: int, block: int) -> list[dict[str, Any]]:
        """Shuffle a block, the rows of a batch together if they are to be of like shape."""
        seed, together = self.position["order"]["seed"], self.position["order"]["together"]
        rng = np.random.default_rng([seed, self.position["epoch"], self.loader.rank, lane, block])
        order = rng.permutation(len(rows))
        if together > 1:
            ratios = np.array([row["width"] / row["height"] for row in rows])
            order = grouped_by_ratio(order, ratios, together, rng)
        return [rows[index] for index in order]

    def _batch(self, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
        pairs = [pair for row in rows if (pair := self._pair(row)) is not None]
        return self.loader.collate(pairs) if pairs else None

    def _pair(self, row: dict[str, Any]) -> tuple[Tensor, dict[str, Any]] | None:
        """Read a row; None if its picture is bad and bad ones are left out."""
        loader = self.loader
        key = (self.position["order"]["seed"], self.position["epoch"], row["image_id"] % 2**64)
        try:
            return read_pair(row, loader.label_map, loader.augmentation, key)
        except (OSError, ValueError):
            problem = inspect_picture(row["image"], row["width"], row["height"], decode=True).problem
            if loader.problems is None or problem is None:
                raise
            loader.problems.add(problem[0], f"{row['file_name']} (image {row['image_id']})", problem[1])
            return None

    def _found(self) -> dict[str, Any]:
        """Take what was left out since the last call."""
        problems = self.loader.problems
        if problems is None:
            return {}
        found, problems.found = problems.found, {}
        return found


class _Rows:
    """Read the shards of one lane one after another, from a position."""

    def __init__(self, loader: StreamLoader, position: Mapping[str, Any], lane: int) -> None:
        lanes = position["lanes"]
        rng = np.random.default_rng([position["order"]["seed"], position["epoch"]])
        order = rng.permutation(loader.stream.num_shards)
        if loader.splits_shards:
            order = order[loader.rank :: loader.num_ranks]
        self.loader, self.order = loader, order[lane :: len(lanes)].tolist()
        self.shard, self.saved = lanes[lane]["shard"], lanes[lane]["rows"]
        self.rows: Any = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        loader, stream = self.loader, self.loader.stream
        while self.shard < len(self.order):
            self.rows = stream.shard(stream.num_shards, self.order[self.shard])
            if not loader.splits_shards:
                self.rows = split_dataset_by_node(self.rows, loader.rank, loader.num_ranks)
            if self.saved is not None:
                self.rows.load_state_dict(self.saved)
            for columns in self.rows.iter(1):  # which, unlike `iter(rows)`, does not deal shards to workers again
                yield {name: column[0] for name, column in columns.items()}
            self.shard, self.saved, self.rows = self.shard + 1, None, None

    def state(self) -> dict[str, Any]:
        """Return the place after the last row that was read."""
        return {"shard": self.shard, "rows": self.saved if self.rows is None else self.rows.state_dict()}


def _as_it_is(item: Any) -> Any:
    return item
