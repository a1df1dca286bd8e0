"""From a traced graph to an ONNX file, and that file with weights of 8 bits."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram


def write_onnx(program: ExportedProgram, path: Path, input_names: Sequence[str], output_names: Sequence[str]) -> None:
    """Translate a traced graph and write it as one file.

    Args:
        program (`torch.export.ExportedProgram`): From `graph.trace` with eager attention.
        path (`Path`): The file.
        input_names (`Sequence[str]`): Names of the inputs, in their order.
        output_names (`Sequence[str]`): Names of the outputs, in their order.
    """
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it tells what it does not fold
    translated = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        input_names=list(input_names),
        output_names=list(output_names),
        custom_translation_table=_translations(),
    )
    assert translated is not None  # it is with dynamo
    translated.save(path, external_data=False)


def quantise(path: Path) -> None:
    """Give the linear layers of an ONNX file weights of 8 bits; their inputs are rounded as they come.

    Convolutions stay as they are: ONNX Runtime has no fast kernel for them without activations known beforehand.

    Args:
        path (`Path`): The file, which is replaced.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory(dir=path.parent) as aside:
        prepared, quantised = Path(aside) / "prepared.onnx", Path(aside) / "quantised.onnx"
        quant_pre_process(path, prepared, skip_symbolic_shape=True)
        quantize_dynamic(
            prepared,
            quantised,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )
        quantised.replace(path)


def _translations() -> dict:
    """Return ONNX forms of the operations whose standard form is slow or missing."""
    from onnxscript.onnx_opset import opset18

    op: Any = opset18  # its annotations are of arrays; what runs through here are values of a graph

    def embedding_bag(
        weight,
        indices,
        offsets,
        scale_grad_by_freq=False,
        mode=0,
        sparse=False,
        per_sample_weights=None,
        include_last_offset=False,
        padding_idx=-1,
    ):
        """Gather and multiply, where the standard form loops over bags. All bags are equally large in our models."""
        shape = op.Concat(op.Shape(offsets), op.Constant(value_ints=[-1]), axis=0)
        rows = op.Gather(weight, op.Reshape(indices, shape))
        weights = op.Unsqueeze(op.Reshape(per_sample_weights, shape), op.Constant(value_ints=[1]))
        sums = op.Squeeze(op.MatMul(weights, rows), op.Constant(value_ints=[1]))
        return sums, offsets, offsets, offsets

    def searchsorted(sorted_sequence, values, out_int32=False, right=False, side=None, sorter=None):
        """Count the knots below each value, which is what a search from the left finds."""
        below = op.Less(sorted_sequence, op.Unsqueeze(values, op.Constant(value_ints=[-1])))
        return op.ReduceSum(op.Cast(below, to=7), op.Constant(value_ints=[-1]), keepdims=0)

    aten = torch.ops.aten
    bags = (aten.embedding_bag.padding_idx, aten._embedding_bag.default, aten._embedding_bag_forward_only.default)
    return dict.fromkeys(bags, embedding_bag) | {aten.searchsorted.Tensor: searchsorted}
