"""Pictures to network input, annotations to labels, network output to boxes.

Three frames meet here and nowhere else: pixels of the original picture (annotations, results), pixels of the resized
picture (network input) and fractions of the *unpadded* picture (labels and `pred_boxes`). Padding only ever adds
pixels at the bottom and the right, so no box depends on it.
"""

import math
from collections.abc import Sequence

import torch
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    SizeDict,
)
from transformers.processing_utils import ImagesKwargs, Unpack

from .mixture import central_quantile, take_components
from .remote_code import PublishedWithCode


class DrmmImageProcessorKwargs(ImagesKwargs, total=False):
    """Settings of the processor besides those every transformers image processor has.

    Attributes:
        size_divisor: Height and width of a batch are padded to the next multiple of it; `pad_size` overrules it.
        calibration: What post-processing corrects, fitted on predictions of the model that the processor belongs to:
            `scores`, a map of the confidences, either `{"method": "temperature", "temperature": T}` or
            `{"method": "isotonic", "scores": [...], "calibrated": [...]}`, rising knots; `scale_factor`, which box
            scales are multiplied with; `fitted_on`, which is not read. All may be left out.
        score_threshold: Threshold of post-processing where a call names none: one number, or one for each class. 0.5
            by default.
    """

    size_divisor: int
    calibration: dict | None
    score_threshold: float | list[float] | None


class DrmmImageProcessor(PublishedWithCode, TorchvisionBackend):
    """Prepare pictures and annotations for D-RMM and turn its output into boxes.

    A picture becomes RGB, is resized (shortest edge 800, longest at most 1333), rescaled to [0, 1], normalised and
    padded with zeros at the bottom and the right to a multiple of 32. Every step has the usual switch (`do_resize`,
    `do_rescale`, `do_normalize`, `do_pad`, `do_convert_rgb`). EXIF orientation is not looked at: turn the picture
    when it is read.

    Size rule: `scale = min(longest / max(h, w), shortest / min(h, w))`, new side `int(side * scale + 0.5)`, at least
    1. The two sides are rounded on their own, so boxes are converted with the ratio of each axis, never with `scale`.

    Source: the size rule is the public code's. Labels are fractions of the unpadded picture, where the DETR
    processors of transformers take fractions of the padded one.
    """

    valid_kwargs = DrmmImageProcessorKwargs
    model_input_names = ["pixel_values", "pixel_mask"]
    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"shortest_edge": 800, "longest_edge": 1333}
    size_divisor = 32
    default_to_square = False
    do_convert_rgb = True
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_pad = True
    calibration = None
    score_threshold = None

    def __init__(self, **kwargs: Unpack[DrmmImageProcessorKwargs]):
        super().__init__(**kwargs)
        if isinstance(self.size_divisor, bool) or not isinstance(self.size_divisor, int) or self.size_divisor < 1:
            raise ValueError(f"size_divisor={self.size_divisor!r}: must be an int of at least 1")
        stds = self.image_std if isinstance(self.image_std, (list, tuple)) else [self.image_std]
        if self.do_normalize and not all(_is_number(std) and 0 < std < math.inf for std in stds):
            raise ValueError(f"image_std={self.image_std!r}: must be numbers above 0")
        if self.calibration is not None:
            _check_calibration(self.calibration)
        thresholds = self.score_threshold if isinstance(self.score_threshold, list) else [self.score_threshold]
        if not thresholds or not all(one is None or (_is_number(one) and 0 <= one <= 1) for one in thresholds):
            raise ValueError(f"score_threshold={self.score_threshold!r}: must be a score in [0, 1], or a list of them")

    def preprocess(
        self,
        images: ImageInput,
        annotations: dict | list[dict] | None = None,
        **kwargs: Unpack[DrmmImageProcessorKwargs],
    ) -> BatchFeature:
        """Turn pictures, and their annotations if given, into a batch.

        Crowd annotations (`iscrowd` 1) never become labels. Boxes that reach over the border are clipped to the
        picture; a box with nothing inside the picture is an error, never a silent drop.

        Args:
            images: One picture or a list: PIL (any mode), numpy array or tensor (HWC or CHW), or path.
            annotations: One dict a picture, either `{"image_id": int, "annotations": [{"bbox", "category_id", "area"?,
                "iscrowd"?, "id"?}, ...]}` or `{"image_id": int, "objects": ...}` with a list of such dicts or one dict
                of lists (`category` and `category_id` mean the same). `bbox` is x, y, width, height in pixels of the
                given picture; the category is the class label, 0..C-1.
            **kwargs: Any setting of the processor, for this call only; `return_tensors="pt"` as usual.

        Returns:
            `pixel_values` (B, 3, H, W) float32; `pixel_mask` (B, H, W) int64, 1 on the picture and 0 on padding (only
            with `do_pad`); with annotations `labels`, a list of dicts: `class_labels` (N,) int64, `boxes` (N, 4)
            float32 cx, cy, w, h as fractions of the unpadded picture, `area` (N,) float32 in pixels of the resized
            picture, `iscrowd` (N,) zeros, `image_id` (1,), `orig_size` and `size` (2,) height, width as given and
            after the resize.

        Raises:
            ValueError: An annotation breaks a rule; the message names picture, annotation, value and rule.
        """
        return super().preprocess(images, annotations, **kwargs)

    def process_image(self, image: ImageInput, do_convert_rgb=None, input_data_format=None, device=None, **kwargs):
        """Turn a picture of any kind into a tensor; one that is already RGB and channels-first stays as it lies.

        Decoders give pictures whose memory is channels-last, which is what resizing is fastest on.

        Args:
            image: PIL, numpy array or tensor.
            do_convert_rgb: Whether to convert it to RGB.
            input_data_format: Where its channels are; by default found from its shape.
            device: Where to put it; by default it stays.
            **kwargs: Passed to the backend.

        Returns:
            (3, H, W), or with another number of channels without `do_convert_rgb`.
        """
        is_rgb = isinstance(image, torch.Tensor) and image.ndim == 3 and image.shape[0] == 3
        if is_rgb and input_data_format in (None, ChannelDimension.FIRST):
            return image.to(device)
        return super().process_image(image, do_convert_rgb, input_data_format, device, **kwargs)

    def resize(self, image: torch.Tensor, size: SizeDict, resample=None, **kwargs) -> torch.Tensor:
        """Resize pictures of one size by the rule of the class docstring, or by another kind of `size`.

        Args:
            image: (..., H, W).
            size: `shortest_edge` and `longest_edge`; or `height` and `width`; or `max_height` and `max_width`.
            resample: Interpolation; bilinear (antialiased) by default.
            **kwargs: Passed to the backend.

        Returns:
            (..., H', W') in the dtype of `image`.
        """
        if size.shortest_edge and size.longest_edge:
            height, width = image.shape[-2:]
            scale = min(size.longest_edge / max(height, width), size.shortest_edge / min(height, width))
            size = SizeDict(height=max(1, int(height * scale + 0.5)), width=max(1, int(width * scale + 0.5)))
        if image.ndim == 3 and image.dtype == torch.uint8 and image.device.type == "cpu":
            # The kernel for bytes works on channels-last memory: other pictures are rearranged there and back.
            image = image[None].contiguous(memory_format=torch.channels_last)[0]
        return super().resize(image, size=size, resample=resample, **kwargs)

    def pad(
        self,
        images: list[torch.Tensor],
        pad_size: SizeDict | None = None,
        size_divisor: int | None = None,
        scales: Sequence[float] | None = None,
        shifts: Sequence[float] | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put pictures into the top-left corner of one zero batch, and normalise them on the way.

        Args:
            images: (3, h, w) each, of any dtype.
            pad_size: Size of the batch; by default the largest height and width, rounded up.
            size_divisor: What to round up to, `self.size_divisor` by default.
            scales: What each channel is multiplied by.
            shifts: What is then subtracted from each channel.
            **kwargs: Ignored; the backend's signature has more.

        Returns:
            `pixel_values` (B, 3, H, W) float32 and `pixel_mask` (B, H, W) int64.

        Raises:
            ValueError: A picture is larger than `pad_size`.
        """
        largest = [max(image.shape[axis] for image in images) for axis in (-2, -1)]
        if pad_size is None:
            divisor = size_divisor or self.size_divisor
            height, width = (math.ceil(side / divisor) * divisor for side in largest)
        elif pad_size.height and pad_size.width:
            height, width = pad_size.height, pad_size.width
        else:
            raise ValueError(f"pad_size={pad_size}: must have 'height' and 'width'")
        if height < largest[0] or width < largest[1]:
            raise ValueError(f"pad_size={(height, width)}: must not be smaller than the resized picture {largest}")
        first = images[0]
        pixel_values = _empty((len(images), first.shape[0], height, width), torch.float32, first.device)
        pixel_mask = _empty((len(images), height, width), torch.int64, first.device)
        for image, values, mask in zip(images, pixel_values, pixel_mask, strict=True):
            bottom, right = image.shape[-2:]
            for channel, plane in enumerate(values[:, :bottom, :right]):  # one at a time stays in the cache
                plane.copy_(image[channel])
                if scales is not None:
                    plane.mul_(scales[channel])
                if shifts is not None:
                    plane.sub_(shifts[channel])
            mask[:bottom, :right] = 1
            for canvas in (values, mask):
                canvas[..., bottom:, :] = 0
                canvas[..., :bottom, right:] = 0
        return pixel_values, pixel_mask

    def _preprocess(
        self,
        images: list[torch.Tensor],
        annotations: dict | list[dict] | None,
        do_resize: bool,
        size: SizeDict,
        resample,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean,
        image_std,
        do_pad: bool,
        pad_size: SizeDict | None,
        size_divisor: int,
        return_tensors,
        **kwargs,
    ) -> BatchFeature:
        annotations = [annotations] if isinstance(annotations, dict) else annotations
        if annotations is not None and len(annotations) != len(images):
            raise ValueError(f"annotations: {len(annotations)} given for {len(images)} images; must be one an image")

        resized = [self.resize(image, size=size, resample=resample) if do_resize else image for image in images]
        sizes = {tuple(image.shape[-2:]) for image in resized}
        if not do_pad:
            if len(sizes) > 1:
                raise ValueError(f"do_pad=False: images of one batch must have one size after the resize, got {sizes}")
            pad_size = SizeDict(height=resized[0].shape[-2], width=resized[0].shape[-1])
        factor = rescale_factor if do_rescale else 1.0
        if do_normalize:
            scales = [factor / std for std in image_std]
            shifts = [mean / std for mean, std in zip(image_mean, image_std, strict=True)]
        else:
            scales, shifts = [factor] * resized[0].shape[0] if do_rescale else None, None
        pixel_values, pixel_mask = self.pad(resized, pad_size, size_divisor, scales, shifts)
        data = {"pixel_values": pixel_values} | ({"pixel_mask": pixel_mask} if do_pad else {})
        batch = BatchFeature(data, tensor_type=return_tensors)
        if annotations is not None:
            batch["labels"] = [
                BatchFeature(_label(annotation, image.shape[-2:], after), tensor_type=return_tensors)
                for annotation, image, after in zip(annotations, images, resized, strict=True)
            ]
        return batch

    def post_process_object_detection(
        self,
        outputs,
        threshold: float | None = None,
        target_sizes: torch.Tensor | list[tuple[float, float]] | None = None,
        top_k: int = 100,
        clip: bool = False,
        interval: float | None = None,
    ) -> list[dict[str, torch.Tensor]]:
        """Pick the best (query, class) pairs of each picture and put their boxes into its own pixels.

        The same query may appear with several classes. There is no NMS. All arithmetic is float32, whatever the
        dtype of `outputs`. By default a box is returned as predicted: it may reach over the border, and its corners
        may be in the wrong order. Where the processor has a `calibration`, scores and scales are the corrected ones;
        `objectness` and `class_probabilities` stay as predicted.

        Args:
            outputs: Output of `DrmmForObjectDetection`, or of any detector with sigmoid `logits` (B, K, C) and
                `pred_boxes` (B, K, 4) cx, cy, w, h in [0, 1] of the unpadded picture.
            threshold: Keep scores above it. None: the processor's `score_threshold`, of each class where it has one
                for each, else 0.5.
            target_sizes: (B, 2) or B pairs: height, width of the original pictures, ints or floats. None: boxes and
                scales stay fractions of the picture.
            top_k: At most this many detections a picture, chosen before the threshold.
            clip: Order the corners (and their scales with them) and clip boxes, and intervals, to the picture.
            interval: Share of the probability, in (0, 1), that an interval about each side holds, with the mixture
                head: quantiles of the density that the model was configured with.

        Returns:
            One dict a picture, sorted by falling score: `scores` (n,), `labels` (n,), `boxes` (n, 4) x1, y1, x2, y2
            in pixels, `query_indices` (n,); with the mixture head also `box_scales` (n, 4) in pixels (left, top,
            right, bottom), `objectness` (n,) and `class_probabilities` (n,) of the chosen class, and on request
            `box_intervals` (n, 4, 2), the lowest and highest coordinate of left, top, right and bottom in pixels.

        Raises:
            ValueError: `target_sizes` has another length than the batch, `top_k` is below 1, there are not as many
                saved thresholds as classes, or `interval` is not in (0, 1) or `outputs` have no density.

        Source: the public code scores every (query, class) pair by p * o and keeps the top 100 without NMS.
        """
        fields = self.top_detections(outputs, target_sizes, top_k)
        limits = self._thresholds(threshold, outputs.logits.shape[-1], fields["scores"].device)[fields["labels"]]
        kept = fields["scores"] > limits
        # Those above their thresholds become the first ones, so that one transfer says how many there are.
        first = (~kept).byte().argsort(dim=1, stable=True)
        fields = {name: take_components(values, first) for name, values in fields.items()}
        boxes, unit = fields["boxes"], _box_unit(target_sizes, len(kept), kept.device)
        if clip:
            inverted = (boxes[..., 2:] < boxes[..., :2]).repeat(1, 1, 2)
            for name in fields.keys() & {"boxes", "box_scales"}:
                fields[name] = torch.where(inverted, fields[name].roll(2, dims=-1), fields[name])
        if interval is not None:
            fields["box_intervals"] = _intervals(fields, outputs, interval)
        if clip:
            for name in fields.keys() & {"boxes", "box_intervals"}:
                frame = unit if name == "boxes" else unit[..., None]
                fields[name] = fields[name].clamp(min=torch.zeros_like(frame), max=frame)

        counts = kept.sum(1).tolist()
        return [{name: field[i, :count] for name, field in fields.items()} for i, count in enumerate(counts)]

    def top_detections(
        self, outputs, target_sizes: torch.Tensor | list[tuple[float, float]] | None = None, top_k: int = 100
    ) -> dict[str, torch.Tensor]:
        """Pick the best (query, class) pairs of each picture as one batch: no threshold, no list, no waiting.

        These are tensor operations alone, so that a model can be exported together with them.

        Args:
            outputs: As `post_process_object_detection` takes them.
            target_sizes: Likewise.
            top_k: Number of detections a picture; as many as there are pairs, if they are fewer.

        Returns:
            The fields of `post_process_object_detection`, each with the picture as its first dimension and the
            detections, by falling score, as its second.

        Raises:
            ValueError: `target_sizes` has another length than the batch, or `top_k` is below 1.
        """
        if top_k < 1:
            raise ValueError(f"top_k={top_k}: must be at least 1")
        logits = outputs.logits.float()
        batch_size, num_queries, num_classes = logits.shape
        # Every map of scores is monotone: choosing by logits keeps the order of those that float32 rounds to 1.
        top_logits, pairs = logits.flatten(1).topk(min(top_k, num_queries * num_classes))
        scores, labels, queries = self._scores(top_logits), pairs % num_classes, pairs // num_classes

        def take(per_query: torch.Tensor) -> torch.Tensor:
            return take_components(per_query.float(), queries)

        centre, size = take(outputs.pred_boxes).split(2, dim=-1)
        unit = _box_unit(target_sizes, batch_size, logits.device)
        boxes = torch.cat((centre - size / 2, centre + size / 2), dim=-1) * unit
        fields = {"scores": scores, "labels": labels, "boxes": boxes, "query_indices": queries}
        if getattr(outputs, "box_scales", None) is not None:
            fields["box_scales"] = take(outputs.box_scales) * unit * (self.calibration or {}).get("scale_factor", 1.0)
        if getattr(outputs, "objectness_logits", None) is not None:
            fields["objectness"] = take(outputs.objectness_logits).sigmoid()
        if getattr(outputs, "class_logits", None) is not None:
            fields["class_probabilities"] = take(outputs.class_logits).softmax(-1).gather(2, labels[..., None])[..., 0]
        return fields

    def _scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Return confidences of log-odds, calibrated where there is a calibration."""
        fitted = (self.calibration or {}).get("scores") or {"method": "temperature", "temperature": 1.0}
        if fitted["method"] == "temperature":
            return torch.sigmoid(logits / fitted["temperature"])
        scores, calibrated = (torch.tensor(fitted[name], device=logits.device) for name in ("scores", "calibrated"))
        given = logits.sigmoid().contiguous()
        upper = torch.searchsorted(scores, given).clamp(max=len(scores) - 1)
        lower = (upper - 1).clamp(min=0)
        width = (scores[upper] - scores[lower]).clamp(min=torch.finfo(scores.dtype).tiny)
        share = ((given - scores[lower]) / width).clamp(0, 1)
        return torch.lerp(calibrated[lower], calibrated[upper], share)

    def _thresholds(self, threshold: float | None, num_classes: int, device: torch.device) -> torch.Tensor:
        """Return the threshold of every class."""
        if threshold is None:
            threshold = 0.5 if self.score_threshold is None else self.score_threshold
        if isinstance(threshold, list):
            if len(threshold) != num_classes:
                raise ValueError(
                    f"score_threshold has {len(threshold)} entries: must be one for {num_classes} classes"
                )
            return torch.tensor(threshold, dtype=torch.float32, device=device)
        return torch.full((num_classes,), threshold, dtype=torch.float32, device=device)


def _intervals(fields: dict[str, torch.Tensor], outputs, level: float) -> torch.Tensor:
    """Return (B, n, 4, 2): low and high of the interval of each side that holds `level` of its probability."""
    freedom = getattr(outputs, "scale_freedom", None)
    if freedom is None or "box_scales" not in fields:
        raise ValueError(f"interval={level}: must be None for outputs without box_scales and scale_freedom")
    reach = central_quantile(level, freedom.flatten()[0].item()) * fields["box_scales"]
    return torch.stack((fields["boxes"] - reach, fields["boxes"] + reach), dim=-1)


def _check_calibration(calibration: dict) -> None:
    """Refuse what is no calibration; `DrmmImageProcessorKwargs` says what is."""
    if not isinstance(calibration, dict):
        raise ValueError(f"calibration={calibration!r}: must be a dict")
    unknown = calibration.keys() - {"scores", "scale_factor", "fitted_on"}
    if unknown:
        raise ValueError(f"calibration has {sorted(unknown)}: must have only scores, scale_factor and fitted_on")
    factor = calibration.get("scale_factor", 1.0)
    if not (_is_number(factor) and 0 < factor < math.inf):
        raise ValueError(f"calibration has scale_factor={factor!r}: must be a number above 0")
    fitted = calibration.get("scores")
    if fitted is None:
        return
    if not isinstance(fitted, dict):
        raise ValueError(f"calibration has scores={fitted!r}: must be a dict")
    if fitted.get("method") == "temperature":
        if not (_is_number(fitted.get("temperature")) and 0 < fitted["temperature"] < math.inf):
            raise ValueError(f"calibration has temperature={fitted.get('temperature')!r}: must be a number above 0")
    elif fitted.get("method") == "isotonic":
        knots = [one if isinstance(one, list) else [] for one in map(fitted.get, ("scores", "calibrated"))]
        rising = all(_is_number(one) for values in knots for one in values) and all(
            0 <= a <= b <= 1 for values in knots for a, b in zip([0.0, *values], [*values, 1.0], strict=True)
        )
        if not knots[0] or len(knots[0]) != len(knots[1]) or not rising:
            raise ValueError(
                "calibration has an isotonic map: must be equally many rising scores and calibrated in [0, 1]"
            )
    else:
        raise ValueError(f"calibration has scores={fitted!r}: must have the method 'temperature' or 'isotonic'")


def _is_number(value) -> bool:
    """Tell numbers from anything else, booleans too."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Allocate a tensor; in a worker of a `DataLoader` in shared memory, to which it would be copied later."""
    if torch.utils.data.get_worker_info() is None or device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape)


def _box_unit(target_sizes, batch_size: int, device: torch.device) -> torch.Tensor:
    """Return (B, 1, 4): width, height, width, height of each picture, or ones."""
    if target_sizes is None:
        return torch.ones(batch_size, 1, 4, device=device)
    if not isinstance(target_sizes, torch.Tensor):
        target_sizes = torch.tensor([[float(side) for side in size] for size in target_sizes])
    if target_sizes.shape != (batch_size, 2):
        raise ValueError(
            f"target_sizes of shape {tuple(target_sizes.shape)}: must be (height, width) for each of the "
            f"{batch_size} pictures of the batch"
        )
    return target_sizes.to(device, torch.float32).flip(1).repeat(1, 2)[:, None]


def _label(annotation: dict, orig_size: tuple[int, int], resized: torch.Tensor) -> dict[str, torch.Tensor]:
    """Check one picture's annotations and return them as the model's labels.

    Args:
        annotation: COCO or `datasets` form, see `DrmmImageProcessor.preprocess`.
        orig_size: Height, width of the picture that the annotation refers to.
        resized: (3, H, W), the picture after the resize.
    """
    image_id = _integer(annotation.get("image_id"))
    if image_id is None:
        raise ValueError(f"image_id={annotation.get('image_id')!r}: must be an integer")
    objects = annotation.get("annotations", annotation.get("objects"))
    if objects is None:
        raise ValueError(f"image_id {image_id}: must have 'annotations' or 'objects', has {sorted(annotation)}")

    height, width = orig_size
    size = resized.shape[-2:]
    pixel_ratio = (size[0] / height) * (size[1] / width)
    boxes, classes, areas = [], [], []
    for index, row in enumerate(_rows(objects, image_id)):
        if row.get("iscrowd"):
            continue
        where = f"image_id {image_id}, annotation {row.get('id', f'number {index}')}"
        try:
            x, y, w, h = (float(number) for number in row.get("bbox"))
        except (TypeError, ValueError):
            x = y = w = h = math.nan
        if not all(map(math.isfinite, (x, y, w, h))):
            raise ValueError(f"{where}: bbox={row.get('bbox')}: must be four finite numbers x, y, width, height")
        if w <= 0 or h <= 0:
            raise ValueError(f"{where}: bbox={[x, y, w, h]}: width and height must be above 0")
        left, top, right, bottom = max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height)
        if right <= left or bottom <= top:
            raise ValueError(f"{where}: bbox={[x, y, w, h]}: must overlap its picture of {width} x {height} pixels")
        given = row.get("category_id", row.get("category"))
        label = _integer(given)
        if label is None or label < 0:
            raise ValueError(f"{where}: category={given!r}: must be a class label, an integer of at least 0")
        area = w * h if row.get("area") is None else float(row["area"])
        if not (math.isfinite(area) and area >= 0):
            raise ValueError(f"{where}: area={area}: must be a finite number of at least 0")
        centre_and_size = ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)
        boxes.append([side / unit for side, unit in zip(centre_and_size, (width, height) * 2, strict=True)])
        classes.append(label)
        areas.append(area * pixel_ratio)
    label = {
        "image_id": torch.tensor([image_id]),
        "class_labels": torch.tensor(classes, dtype=torch.int64),
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "area": torch.tensor(areas, dtype=torch.float32),
        "iscrowd": torch.zeros(len(classes), dtype=torch.int64),
        "orig_size": torch.tensor(orig_size),
        "size": torch.tensor(size),
    }
    return {name: value.to(resized.device) for name, value in label.items()}


def _integer(value) -> int | None:
    """Return a whole number (7, 7.0, a 0-d array or tensor) as an int, anything else as None."""
    try:
        return int(value) if int(value) == value else None
    except (TypeError, ValueError, OverflowError):
        return None


def _rows(objects: dict | list, image_id: int) -> list[dict]:
    """Return annotations as a list of dicts, whether they come as that or as a dict of lists."""
    if not isinstance(objects, dict):
        return list(objects)
    objects = {name: column for name, column in objects.items() if column is not None}
    lengths = {name: len(column) for name, column in objects.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"image_id {image_id}: objects must have lists of one length, got {lengths}")
    return [dict(zip(objects, values, strict=True)) for values in zip(*objects.values(), strict=True)]


__all__ = ["DrmmImageProcessor", "DrmmImageProcessorKwargs"]
