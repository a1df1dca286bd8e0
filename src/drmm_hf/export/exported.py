"""Run what was exported, whatever its format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


FILES = {"onnx": "model.onnx", "torch": "model.pt2", "openvino": "model.xml"}


class ExportedDetector:
    """A graph of a folder that `export_detector` wrote, called as the graph was.

    Args:
        folder (`str` or `Path`): The folder.
        threads (`int`, *optional*): Threads of ONNX Runtime or OpenVINO; by default those of torch, as for a graph of
            torch's own.

    Attributes:
        about (`dict`): What `export.json` says.
    """

    def __init__(self, folder: str | Path, threads: int | None = None):
        folder = Path(folder)
        self.about: dict[str, Any] = json.loads((folder / "export.json").read_text(encoding="utf-8"))
        form = self.about["format"]
        self._run = _RUNNERS[form](folder / FILES[form], threads or torch.get_num_threads())

    @torch.no_grad()
    def __call__(
        self, pixel_values: Tensor, pixel_mask: Tensor, target_sizes: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Detect; arguments and result are those of `DetectionGraph`.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): normalised pictures, float32.
            pixel_mask (`torch.Tensor` of shape `(B, H, W)`): 1 on the picture, 0 on padding, int64.
            target_sizes (`torch.Tensor` of shape `(B, 2)`, *optional*): (height, width) of the original pictures,
                float32; for a graph with post-processing only.

        Returns:
            `dict[str, torch.Tensor]`: By name of the output.

        Raises:
            ValueError: If the graph needs `target_sizes`.
        """
        inputs = {"pixel_values": pixel_values, "pixel_mask": pixel_mask}
        if target_sizes is not None:
            inputs["target_sizes"] = target_sizes
        elif "target_sizes" in self.about["inputs"]:
            raise ValueError("target_sizes is None; this graph needs the (height, width) of each picture.")
        return self._run({name: inputs[name] for name in self.about["inputs"]})


def _onnx_runner(path: Path, threads: int) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        values = session.run(names, {name: value.numpy() for name, value in inputs.items()})
        return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}

    return run


def _torch_runner(path: Path, threads: int) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    module = torch.export.load(path).module()
    return lambda inputs: module(**inputs)


def _openvino_runner(path: Path, threads: int) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    import openvino

    # By itself it computes in bfloat16 where the processor can.
    properties = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    model = openvino.Core().compile_model(path, "CPU", properties)
    names = [output.get_any_name() for output in model.outputs]

    def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        values = model({name: value.numpy() for name, value in inputs.items()}, share_outputs=False)
        return {name: torch.from_numpy(values[name]) for name in names}

    return run


_RUNNERS = {"onnx": _onnx_runner, "torch": _torch_runner, "openvino": _openvino_runner}
