"""Write a detector as a folder that other runtimes read."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

import drmm_onnx

from ..conversion.new_folder import new_folder
from ..evaluation.files import write_json
from ..modeling.image_processing_drmm import DrmmImageProcessor
from ..modeling.modeling_drmm import DrmmForObjectDetection
from .exported import FILES, ExportedDetector
from .graph import DetectionGraph, trace
from .onnx_file import quantise, write_onnx
from .parity import compare_with_eager


DTYPES = ("float32", "bfloat16", "float16")
# Packages of each format beyond what this package needs anyway, and so the name of its extra.
_PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}


def check_export(form: str, dtype: str = "float32", int8: bool = False) -> None:
    """Refuse what cannot be exported, before any work.

    Args:
        form (`str`): "onnx", "torch" or "openvino".
        dtype (`str`): "float32", "bfloat16" or "float16".
        int8 (`bool`): Whether weights of linear layers get 8 bits.

    Raises:
        ValueError: If the choices do not go together, or a package is not installed.
    """
    if form not in FILES:
        raise ValueError(f"format is {form!r}; it must be one of {', '.join(FILES)}.")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}.")
    if dtype == "bfloat16" and form == "onnx":
        raise ValueError("dtype bfloat16 is not for onnx: ONNX Runtime has no convolution in it on CPUs.")
    if dtype != "float32" and form == "openvino":
        raise ValueError(
            f"dtype {dtype} is not for openvino: its model is float32, and INFERENCE_PRECISION_HINT says what it "
            "computes in."
        )
    if int8 and (form, dtype) != ("onnx", "float32"):
        raise ValueError(f"int8 is not for {form} in {dtype}; it is for onnx in float32.")
    missing = [name for name in _PACKAGES.get(form, ()) if find_spec(name) is None]
    if missing:
        raise ValueError(f"format {form} needs {' and '.join(missing)}: pip install 'drmm-hf[{form}]'")


def export_detector(
    model: DrmmForObjectDetection,
    processor: DrmmImageProcessor,
    output: str | Path,
    form: str = "onnx",
    *,
    dtype: str = "float32",
    int8: bool = False,
    post_process: bool = False,
    say: Callable[[str], None] = lambda words: None,
) -> dict[str, Any]:
    """Export a detector and compare it with the model in torch.

    Args:
        model (`DrmmForObjectDetection`): In float32 on the CPU. It is cast to `dtype`.
        processor (`DrmmImageProcessor`): Its image processor.
        output (`str` or `Path`): The folder, which appears when it is complete; it must not exist, or be empty. It
            gets the graph, `config.json`, `preprocessor_config.json` and `export.json`; with ONNX also `drmm_onnx.py`,
            which runs the graph without torch.
        form (`str`): "onnx", "torch" or "openvino".
        dtype (`str`): Type of the weights; pictures and predictions are float32 all the same.
        int8 (`bool`): Give linear layers weights of 8 bits.
        post_process (`bool`): Let the graph end in the 100 best detections.
        say (`Callable`): Called with what is done, before each part of the work.

    Returns:
        `dict`: What `export.json` says: format, inputs, outputs, versions, and under `parity` the differences to the
        model in float32, see `compare_with_eager`.

    Raises:
        FileExistsError: If `output` exists and is not empty.
        ValueError: See `check_export` and `trace`.
    """
    check_export(form, dtype, int8)
    with new_folder(output) as folder:
        about: dict[str, Any] = {"format": form, "dtype": dtype, "int8": int8, "post_process": post_process}
        graph = DetectionGraph(_in_dtype(model, getattr(torch, dtype)), processor if post_process else None)
        say("tracing the model")
        program = trace(graph, "sdpa" if form == "torch" else "eager")
        about["inputs"] = ["pixel_values", "pixel_mask", *(["target_sizes"] if post_process else [])]
        outputs = program.call_spec.out_spec
        about["outputs"] = list(outputs.unflatten(range(outputs.num_leaves)))
        about["versions"] = {name: version(name) for name in ("torch", "transformers", *_PACKAGES.get(form, ()))}
        say(f"writing {form}")
        if form == "torch":
            torch.export.save(program, folder / FILES[form])
        else:
            write_onnx(program, folder / FILES["onnx"], about["inputs"], about["outputs"])
        if int8:
            quantise(folder / FILES["onnx"])
        if form == "openvino":
            _to_openvino(folder)
        elif form == "onnx":
            shutil.copy(drmm_onnx.__file__, folder)
        model.config.save_pretrained(folder)
        processor.save_pretrained(folder)
        write_json(about, folder / "export.json")
        say("comparing with the model")
        about["parity"] = compare_with_eager(model, processor, ExportedDetector(folder))
        write_json(about, folder / "export.json")
    return about


def _in_dtype(model: DrmmForObjectDetection, dtype: torch.dtype) -> DrmmForObjectDetection:
    """Return the model, or a copy in another type; its query boxes keep theirs, as `from_pretrained` does it."""
    if dtype == model.dtype:
        return model
    cast = copy.deepcopy(model)
    nn.Module.to(cast, dtype)
    cast.model.queries.boxes.data = model.model.queries.boxes.data.clone()
    return cast


def _to_openvino(folder: Path) -> None:
    """Turn the ONNX file of a folder into OpenVINO's two; its own reader of traced graphs lacks operations of ours."""
    import openvino

    model = openvino.convert_model(folder / FILES["onnx"])
    openvino.save_model(model, folder / FILES["openvino"], compress_to_fp16=False)
    (folder / FILES["onnx"]).unlink()
