"""Detect objects with an exported D-RMM, without torch and transformers: numpy, Pillow and onnxruntime are enough.

This file needs nothing else of its package. `drmm export --post-process` puts a copy beside the graph, so that the
folder runs by itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps


class OnnxDetector:
    """A detector in a folder that `drmm export --format onnx --post-process` wrote.

    Args:
        folder (`str` or `Path`): The folder: `model.onnx`, `config.json` and `preprocessor_config.json`.
        threads (`int`): Threads of a run; 0 lets ONNX Runtime choose.
        providers (`Sequence[str]`): ONNX Runtime's execution providers, by falling preference.

    Attributes:
        id2label (`dict[int, str]`): Name of each class.

    Raises:
        ImportError: If onnxruntime is not installed.
        ValueError: If the graph does not choose detections, or the folder asks for another way of resizing.
    """

    def __init__(self, folder: str | Path, threads: int = 0, providers: Sequence[str] = ("CPUExecutionProvider",)):
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError("OnnxDetector needs onnxruntime: pip install 'drmm-hf[onnx]'") from error

        folder = Path(folder)
        self.settings = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.id2label = {int(label): name for label, name in config["id2label"].items()}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=list(providers))
        self.names = [output.name for output in self.session.get_outputs()]
        if "scores" not in self.names:
            raise ValueError(f"{folder / 'model.onnx'} gives {self.names}; export it with --post-process.")
        resized_size(self.settings, 1, 1)
        if not self.settings["do_pad"] or self.settings["size_divisor"] % 32:
            raise ValueError(
                f"do_pad is {self.settings['do_pad']} and size_divisor {self.settings['size_divisor']}; "
                "the graph needs pictures padded to multiples of 32."
            )

    def __call__(self, images, threshold: float | None = None) -> dict | list[dict]:
        """Detect objects.

        Args:
            images: A picture or a list of them: path, PIL image, or array of bytes `(H, W, 3)` or `(H, W)`. A list is
                one batch, padded to its largest, which moves scores a little: give pictures of unequal size one by
                one. What a path names is turned as its EXIF entry says.
            threshold (`float`, *optional*): Keep scores above it. By default the folder's own threshold, of each class
                where it has one for each, else 0.5.

        Returns:
            `dict` for one picture, a list of them for a list: arrays by falling score, as
            `DrmmImageProcessor.post_process_object_detection` returns them: `scores` (n,), `labels` (n,), `boxes`
            (n, 4) x1, y1, x2, y2 in pixels of the picture, `query_indices` (n,), and with a mixture head `box_scales`
            (n, 4), `objectness` (n,) and `class_probabilities` (n,).
        """
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"threshold is {threshold}; scores lie in [0, 1].")
        one = not isinstance(images, list | tuple)
        if not one and not images:
            return []
        pictures = [open_picture(image) for image in ([images] if one else images)]
        inputs = preprocess(pictures, self.settings)
        inputs["target_sizes"] = np.array([(image.height, image.width) for image in pictures], dtype=np.float32)
        outputs = dict(zip(self.names, self.session.run(self.names, inputs), strict=True))
        if threshold is None:
            threshold = self.settings.get("score_threshold")
        limits = np.asarray(0.5 if threshold is None else threshold, dtype=np.float32)
        limits = np.broadcast_to(limits, (len(self.id2label),))[outputs["labels"]]
        kept = outputs["scores"] > limits
        results = [
            {name: values[index][kept[index]] for name, values in outputs.items()} for index in range(len(pictures))
        ]
        return results[0] if one else results


def open_picture(image) -> Image.Image:
    """Return a picture as an RGB image.

    Args:
        image: Path, PIL image, or array of bytes `(H, W, 3)` or `(H, W)`.

    Raises:
        ValueError: If it is something else, or not of 8 bits.
    """
    if isinstance(image, str | Path):
        with Image.open(image) as opened:
            image = ImageOps.exif_transpose(opened)
    elif isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
            raise ValueError(
                f"image is an array of {image.dtype} {image.shape}; it must be of uint8, (H, W, 3) or (H, W)."
            )
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise ValueError(f"image is {image!r:.80}; it must be a path, a PIL image or an array.")
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"image has pixels of mode {image.mode!r}; convert it to 8 bits first.")
    return image.convert("RGB")


def resized_size(settings: dict, height: int, width: int) -> tuple[int, int]:
    """Return the height and width that a picture is resized to.

    Args:
        settings (`dict`): Of `preprocessor_config.json`.
        height (`int`): Of the picture.
        width (`int`): Of the picture.

    Raises:
        ValueError: If `size` is neither of shortest and longest edge nor of height and width.
    """
    if not settings["do_resize"]:
        return height, width
    size = settings["size"]
    if {"shortest_edge", "longest_edge"} <= size.keys():
        scale = min(size["longest_edge"] / max(height, width), size["shortest_edge"] / min(height, width))
        return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))
    if {"height", "width"} <= size.keys():
        return size["height"], size["width"]
    raise ValueError(f"size is {size}; it must have shortest_edge and longest_edge, or height and width.")


def preprocess(pictures: Sequence[Image.Image], settings: dict) -> dict[str, np.ndarray]:
    """Turn pictures into a batch, as `DrmmImageProcessor` does.

    Args:
        pictures (`Sequence[PIL.Image.Image]`): RGB.
        settings (`dict`): Of `preprocessor_config.json`.

    Returns:
        `dict[str, np.ndarray]`: `pixel_values` (B, 3, H, W) float32 and `pixel_mask` (B, H, W) int64.
    """
    sizes = [resized_size(settings, image.height, image.width) for image in pictures]
    divisor = settings["size_divisor"] if settings["do_pad"] else 1
    height, width = (math.ceil(max(side) / divisor) * divisor for side in zip(*sizes, strict=True))
    pixel_values = np.zeros((len(pictures), 3, height, width), dtype=np.float32)
    pixel_mask = np.zeros((len(pictures), height, width), dtype=np.int64)
    for image, (bottom, right), values, mask in zip(pictures, sizes, pixel_values, pixel_mask, strict=True):
        if image.size != (right, bottom):
            image = image.resize((right, bottom), Image.Resampling(settings["resample"]))
        pixels = np.asarray(image, dtype=np.float32)
        if settings["do_rescale"]:
            pixels = pixels * np.float32(settings["rescale_factor"])
        if settings["do_normalize"]:
            mean, std = (np.array(settings[name], dtype=np.float32) for name in ("image_mean", "image_std"))
            pixels = (pixels - mean) / std
        values[:, :bottom, :right] = pixels.transpose(2, 0, 1)
        mask[:bottom, :right] = 1
    return {"pixel_values": pixel_values, "pixel_mask": pixel_mask}
