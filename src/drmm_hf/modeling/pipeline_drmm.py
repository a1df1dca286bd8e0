"""An object-detection pipeline that batches pictures of any shapes and keeps float boxes and their scales."""

import torch
from transformers import ObjectDetectionPipeline
from transformers.image_utils import load_image


class DrmmObjectDetectionPipeline(ObjectDetectionPipeline):
    """Detect objects in pictures, a batch at a time.

    Use it as `pipeline("object-detection", model=..., pipeline_class=DrmmObjectDetectionPipeline)`; the stock class
    works too, but refuses batches of mixed shapes, cuts boxes to whole pixels and has a threshold of its own, 0.5,
    unless it is made or called with `threshold=None`. Pictures are resized one by one and padded together. A larger
    padding can move a convolutional network's boxes a little (never their frame): take `batch_size=1` where figures
    must not depend on the neighbours.

    A call takes the stock arguments (`threshold`, `timeout`, `batch_size`, ...) and `top_k`, `clip` and `interval` of
    `DrmmImageProcessor.post_process_object_detection`; without a `threshold` it is the processor's own. It returns for
    each picture a list of `{"score": float, "label": str, "box": {"xmin", "ymin", "xmax", "ymax"}}` in pixels of the
    picture, floats; with the mixture head also `"box_scales"`, the scale of each side in pixels under the same four
    names, and with `interval` `"box_interval"`, there the lowest and highest coordinate of each side.
    """

    def _sanitize_parameters(self, **kwargs):
        preprocess_params, forward_params, postprocess_params = super()._sanitize_parameters(**kwargs)
        postprocess_params |= {name: kwargs[name] for name in ("top_k", "clip", "interval") if name in kwargs}
        return preprocess_params, forward_params, postprocess_params

    def preprocess(self, image, timeout=None):
        """Load and resize one picture."""
        image = load_image(image, timeout=timeout)
        inputs = self.image_processor(images=[image], do_pad=False, return_tensors="pt")
        # The stock collate function concatenates tensors of one shape and leaves everything else as a list of items.
        return {"images": list(inputs["pixel_values"]), "target_size": torch.tensor([[image.height, image.width]])}

    def _forward(self, model_inputs):
        # [picture] of a single item, [[picture], [picture], ...] of a batch
        images = [image for item in model_inputs["images"] for image in (item if isinstance(item, list) else [item])]
        pixel_values, pixel_mask = self.image_processor.pad(images)
        outputs = self.model(pixel_values=pixel_values.to(self.dtype), pixel_mask=pixel_mask)
        return type(outputs)({"target_size": model_inputs["target_size"], **outputs})

    def postprocess(self, model_outputs, threshold=None, top_k=100, clip=False, interval=None):
        """Turn the output for one picture into a list of detections."""
        result = self.image_processor.post_process_object_detection(
            model_outputs, threshold, model_outputs["target_size"], top_k=top_k, clip=clip, interval=interval
        )[0]
        detections = [
            {"score": score, "label": self.model.config.id2label[label], "box": self._get_bounding_box(box)}
            for score, label, box in zip(
                result["scores"].tolist(), result["labels"].tolist(), result["boxes"], strict=True
            )
        ]
        for detection, scales in zip(detections, result.get("box_scales", ()), strict=False):
            detection["box_scales"] = self._get_bounding_box(scales)
        for detection, limits in zip(detections, result.get("box_intervals", ()), strict=False):
            detection["box_interval"] = self._get_bounding_box(limits)
        return detections

    def _get_bounding_box(self, box: torch.Tensor) -> dict[str, float | list[float]]:
        """Name what the four sides of a box have, without rounding."""
        return dict(zip(("xmin", "ymin", "xmax", "ymax"), box.tolist(), strict=True))


__all__ = ["DrmmObjectDetectionPipeline"]
