"""Run any transformers object detector over pictures."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, NamedTuple

import datasets
import torch
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import FileMetadataError
from huggingface_hub.utils import HFValidationError, httpx
from safetensors import SafetensorError
from tqdm import tqdm
from transformers.utils import SAFE_WEIGHTS_NAME, WEIGHTS_NAME

from drmm_hf.data.loading import load_image

from .detections import Detections


if TYPE_CHECKING:
    from transformers import PreTrainedModel

# How many batches of pictures may wait for others of their size: more cost memory, fewer leave batches unfilled.
_WAITING_BATCHES = 4


def load_detector(
    name: str, device: str | torch.device | None = None, dtype: str | None = None
) -> tuple[PreTrainedModel, Any]:
    """Load a detector and its image processor.

    Args:
        name (`str`): Folder or Hub id of any transformers object detector.
        device (`str` or `torch.device`, *optional*): Where to put it. By default a GPU if there is one.
        dtype (`str`, *optional*): Type of its weights, as "bfloat16". By default the one it was saved in.

    Returns:
        `tuple[PreTrainedModel, Any]`: The model in evaluation mode and its processor.

    Raises:
        ValueError: If there is no detector of this name, if its weights are damaged or incomplete (transformers would
            fill the gaps with random numbers), if the settings of its image processor are damaged, if it has not one
            saved threshold a class, or if there is no such device.
    """
    from transformers import AutoImageProcessor, AutoModelForObjectDetection

    check_reachable(name)
    try:
        model, report = AutoModelForObjectDetection.from_pretrained(
            name, dtype=dtype or "auto", ignore_mismatched_sizes=True, output_loading_info=True
        )
    except (OSError, SafetensorError, UnpicklingError) as error:
        raise ValueError(f"model is {name!r}, which is no detector in a folder or on the Hub: {error}") from error
    with readable_settings(name):
        processor = AutoImageProcessor.from_pretrained(name)
    lacking = [*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])]
    lacking = [key for key in lacking if not key.endswith("num_batches_tracked")]  # counts for training alone
    if lacking:
        raise ValueError(
            f"model is {name!r}, whose weights do not fit its config: {len(lacking)} are missing or of another shape, "
            f"such as {min(lacking)}"
        )
    thresholds = getattr(processor, "score_threshold", None)
    if isinstance(thresholds, list) and len(thresholds) != model.config.num_labels:
        raise ValueError(
            f"model is {name!r}, whose preprocessor_config.json has a score_threshold of {len(thresholds)} entries; "
            f"the rule is one for each of its {model.config.num_labels} classes."
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return model.to(device).eval(), processor
    except RuntimeError as error:
        raise ValueError(f"device is {str(device)!r}, which cannot be used: {error}") from error


def check_reachable(name: str, argument: str = "model", repository: str | None = None) -> None:
    """Ask the Hub once for a model that is not in its cache: a download would ask for half a minute.

    Args:
        name (`str`): Folder or Hub id; of a folder nothing is asked.
        argument (`str`): Its name in the message.
        repository (`str`, *optional*): Where it lies on the Hub, if the name is another one.

    Raises:
        ValueError: If there is no connection, or HF_HUB_OFFLINE forbids one. What the Hub answers is left to the
            download.
    """
    if Path(name).is_dir():
        return
    place, files = repository or name, ("config.json", SAFE_WEIGHTS_NAME, WEIGHTS_NAME)
    try:
        if any(isinstance(try_to_load_from_cache(place, file), str) for file in files):
            return
        if constants.HF_HUB_OFFLINE:
            raise ValueError(
                f"{argument} is {name!r}, which is no folder here and not in the cache of the Hub, and HF_HUB_OFFLINE "
                "forbids to ask it"
            )
        get_hf_file_metadata(hf_hub_url(place, "config.json"))
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise ValueError(
            f"{argument} is {name!r}, which is no folder here, and the Hub cannot be reached: {error}"
        ) from error
    except (httpx.HTTPError, FileMetadataError, HFValidationError):
        return


@contextmanager
def readable_settings(name: str, argument: str = "model") -> Iterator[None]:
    """Turn what transformers raises over the settings of an image processor into an error that names their file.

    Args:
        name (`str`): Folder or Hub id of the model.
        argument (`str`): Its name in the message.

    Raises:
        ValueError: Instead of any other error that such a file can cause.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(f"{argument} is {name!r}, whose preprocessor_config.json cannot be used: {error}") from error
    except (AttributeError, TypeError, LookupError) as error:  # transformers takes any json for settings
        raise ValueError(
            f"{argument} is {name!r}, whose preprocessor_config.json does not hold the settings of an image "
            f"processor: {error}"
        ) from error


@torch.no_grad()
def predict(
    model: torch.nn.Module,
    processor: Any,
    dataset: Iterable[Mapping[str, Any]],
    batch_size: int = 1,
    device: str | torch.device | None = None,
    top_k: int = 100,
    progress: bool = True,
) -> Detections:
    """Find the objects in every picture of a dataset.

    Each picture is processed alone, and only pictures of equal processed size share a batch: nothing is padded for the
    sake of a batch, so the figures do not depend on `batch_size` (beyond rounding). Detectors other than D-RMM see
    unpadded pictures, even if their processor pads to a fixed size: transformers' processors make labels that are
    fractions of the padded picture but read predictions as fractions of the unpadded one. Only without padding are
    both the same box.

    Args:
        model (`torch.nn.Module`): A transformers object detector: its output has `logits` and `pred_boxes` and feeds
            the processor's `post_process_object_detection`.
        processor (`Any`): The image processor of the model.
        dataset (`Iterable[Mapping]`): Rows with `image_id` and a PIL `image`, such as a canonical dataset, whose
            pictures are turned as their annotations see them. A row whose `image_id` was seen before is left out, so
            repeated pictures of a distributed sampler count once.
        batch_size (`int`): Largest number of pictures in a batch.
        device (`str` or `torch.device`, *optional*): Where to run; the model is moved there. By default where it is.
        top_k (`int`): Number of detections kept a picture, over all classes, without a threshold.
        progress (`bool`): Whether to show a progress bar. It shows after two seconds only.

    Returns:
        `Detections`: One result a picture, in the order of the dataset, boxes in pixels of the original picture.

    Raises:
        ValueError: If `batch_size` or `top_k` is below 1, if the processor cannot post-process detections or would
            misread the scores, if the model gives no boxes, if a picture is not of 8 bits or of another size than its
            annotations, or if a result is not finite.
    """
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}; the rule is at least 1.")
    if not hasattr(processor, "post_process_object_detection"):
        raise ValueError(f"processor is a {type(processor).__name__}, which has no post_process_object_detection.")
    if device is not None:
        model.to(device)
    is_drmm = getattr(getattr(model, "config", None), "model_type", None) == "drmm"
    process = processor if is_drmm or not hasattr(processor, "do_pad") else partial(processor, do_pad=False)
    was_training = model.training
    model.eval()
    detections = Detections()
    positions: dict[int, int] = {}
    try:
        for batch in picture_batches(process, dataset, batch_size, progress, "predicting"):
            found = _detect(model, processor, batch.inputs, batch.sizes, top_k)
            positions |= zip(batch.image_ids, batch.positions, strict=True)
            for image_id, result in zip(batch.image_ids, found, strict=True):
                detections.add(image_id, result, top_k)
    finally:
        model.train(was_training)
    return detections.select(sorted(positions, key=positions.__getitem__))


class PictureBatch(NamedTuple):
    """Pictures of equal processed size.

    Attributes:
        positions (`list[int]`): Place of each picture among those of the dataset, repeated ones aside.
        image_ids (`list[int]`): Their ids.
        sizes (`list[tuple[int, int]]`): (height, width) of the original pictures.
        inputs (`dict[str, torch.Tensor]`): `pixel_values` and, if the processor makes it, `pixel_mask`, on the CPU.
    """

    positions: list[int]
    image_ids: list[int]
    sizes: list[tuple[int, int]]
    inputs: dict[str, torch.Tensor]


def picture_batches(
    processor: Callable[..., Mapping[str, Any]],
    dataset: Iterable[Mapping[str, Any]],
    batch_size: int = 1,
    progress: bool = True,
    description: str = "predicting",
) -> Iterator[PictureBatch]:
    """Process each picture alone and yield batches of those that come out equally large.

    Args:
        processor (`Callable`): The image processor of a model.
        dataset (`Iterable[Mapping]`): As in `predict`; a repeated picture counts once.
        batch_size (`int`): Largest number of pictures in a batch.
        progress (`bool`): Whether to show a progress bar. It shows after two seconds only.
        description (`str`): What the bar says.

    Yields:
        `PictureBatch`: Each picture once, not in the order of the dataset.

    Raises:
        ValueError: If `batch_size` is below 1, or a picture is not of 8 bits or of another size than its annotations.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; the rule is at least 1.")
    if isinstance(dataset, datasets.Dataset):
        dataset = dataset.cast_column("image", datasets.Image(decode=False))
    waiting: dict[tuple[int, ...], list[tuple[Any, ...]]] = defaultdict(list)
    seen: set[int] = set()

    def take(size: tuple[int, ...]) -> PictureBatch:
        positions, image_ids, sizes, inputs = map(list, zip(*waiting.pop(size), strict=True))
        joined = {name: torch.cat([entry[name] for entry in inputs]) for name in inputs[0]}
        return PictureBatch(positions, image_ids, sizes, joined)

    total = len(dataset) if isinstance(dataset, Sized) else None
    hidden = None if progress else True  # None: shown on a terminal
    with tqdm(total=total, desc=description, unit="image", delay=2, disable=hidden, leave=False) as bar:
        for row in dataset:
            bar.update()
            image_id = int(row["image_id"])
            if image_id in seen:
                continue
            image = load_image(row)
            inputs = processor(images=[image], return_tensors="pt")
            inputs = {name: inputs[name] for name in ("pixel_values", "pixel_mask") if name in inputs}
            size = tuple(inputs["pixel_values"].shape)
            waiting[size].append((len(seen), image_id, (image.height, image.width), inputs))
            seen.add(image_id)
            if len(waiting[size]) == batch_size:
                yield take(size)
            elif sum(map(len, waiting.values())) >= _WAITING_BATCHES * batch_size:
                yield take(next(iter(waiting)))  # the size that waits longest
        for size in list(waiting):
            yield take(size)


def to_model(inputs: Mapping[str, torch.Tensor], model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Bring the inputs of a batch to the device of a model, and the pictures to its precision.

    Args:
        inputs (`Mapping[str, torch.Tensor]`): Of a `PictureBatch`.
        model (`torch.nn.Module`): The detector.

    Returns:
        `dict[str, torch.Tensor]`: Arguments of the model.
    """
    parameter = next(model.parameters())
    moved = {name: value.to(parameter.device) for name, value in inputs.items()}
    return moved | {"pixel_values": moved["pixel_values"].to(parameter.dtype)}


def _detect(
    model: torch.nn.Module,
    processor: Any,
    inputs: Mapping[str, torch.Tensor],
    target_sizes: Sequence[tuple[int, int]],
    top_k: int,
) -> list[Mapping[str, Any]]:
    """Run one batch and return the processor's result of each picture, on the CPU."""
    outputs = model(**to_model(inputs, model))
    lacking = [name for name in ("logits", "pred_boxes") if name not in outputs]
    if lacking:
        raise ValueError(f"the output of the model has no {' and no '.join(lacking)}; a detector's has both.")
    for name in ("logits", "pred_boxes"):  # half precision cannot name a pixel of a large picture
        outputs[name] = outputs[name].float()
        # A processor would drop them without a word: no score is above a threshold if it is not a number.
        if outputs[name].isnan().any():
            raise ValueError(f"{name} of the model are not finite; look at its weights, or run it in float32.")

    # Processors keep what lies strictly above the threshold: -1 keeps scores of exactly 0 too.
    options = {"threshold": -1.0, "target_sizes": torch.tensor(target_sizes)}
    known = inspect.signature(processor.post_process_object_detection).parameters
    if "top_k" in known:
        options["top_k"] = top_k
    if "use_focal_loss" in known and not getattr(getattr(model, "config", None), "use_focal_loss", True):
        raise ValueError(
            "config.use_focal_loss is False, and transformers' RT-DETR processor takes the softmax of such scores "
            "over the pictures of a batch; only models trained with a focal loss can be measured."
        )
    results = processor.post_process_object_detection(outputs, **options)
    return [
        {name: value.cpu() for name, value in result.items() if isinstance(value, torch.Tensor)} for result in results
    ]
