"""Read a checkpoint file of others: its weights, and what it says about classes and settings."""

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .tensor_file import read_tensor_file


# Entries beside the weights that hold tensors too.
_TRAINING_STATE = "state of the training run"
_DROPPED_ENTRIES = {
    "optimizer": _TRAINING_STATE,
    "scheduler": _TRAINING_STATE,
    "lr_scheduler": _TRAINING_STATE,
    "param_schedulers": _TRAINING_STATE,
    "message_hub": _TRAINING_STATE,
    "loss_scaler": _TRAINING_STATE,
    "grad_scaler": _TRAINING_STATE,
    # mmengine swaps the two sets of weights when it saves.
    "ema_state_dict": "weights that were not averaged; those of state_dict are the moving average",
}


class PublicCheckpoint(NamedTuple):
    """What a checkpoint file holds.

    Attributes:
        weights (`dict[str, torch.Tensor]`): by public name, without a wrapper's prefix.
        class_names (`list[str]` or `None`): of the data set it was trained on, if it tells.
        settings (`dict[str, list]`): from `stated_settings` on the training configuration inside.
        dropped (`dict[str, str]`): reason by name of every entry and every tensor that is left out.
    """

    weights: dict[str, Tensor]
    class_names: list[str] | None
    settings: dict[str, list]
    dropped: dict[str, str]


def read_checkpoint(path: str | Path, trust_pickle: bool = False) -> PublicCheckpoint:
    """Read a checkpoint of the mmdetection or detectron2 family, or a bare state dict.

    Where a hook kept a moving average, the plain names are taken: both mmcv's and mmengine's hooks swap the two sets
    before saving, so that plain names hold the average, and they are what mmdetection itself evaluates.

    Args:
        path (`str` or `Path`): a file of `torch.save` or of safetensors; its first bytes tell which.
        trust_pickle (`bool`): unpickle objects other than tensors and plain values, which runs code of whoever wrote
            the file.

    Returns:
        `PublicCheckpoint`: weights and what belongs to them.

    Raises:
        FileNotFoundError: if `path` is no file.
        ValueError: if the file cannot be read, needs `trust_pickle`, holds no state dict, or holds tensors outside it
            that nothing explains; what was found is in the message.
    """
    content = read_tensor_file(path, trust_pickle)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}; it must hold a state dict.")
    if not _holds_tensors(content):
        entries = f"only {', '.join(map(repr, list(content)[:5]))}" if content else "nothing at all"
        raise ValueError(f"{path} holds no tensor, {entries}; it must hold a state dict.")
    entry = next((name for name in ("state_dict", "model") if isinstance(content.get(name), Mapping)), None)
    weights, dropped = dict(content if entry is None else content[entry]), {}
    for name, value in content.items() if entry is not None else ():
        if name in (entry, "meta"):
            continue
        if name not in _DROPPED_ENTRIES and _holds_tensors(value):
            raise ValueError(f"{path}: nothing explains the entry {name!r}, which holds tensors beside {entry!r}.")
        dropped[name] = _DROPPED_ENTRIES.get(name, "holds no tensor")
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{path}: {name!r} is a {type(value).__name__}; a state dict holds tensors by name.")
        if value.layout is not torch.strided or value.is_quantized or value.is_meta:
            raise ValueError(f"{path}: {name!r} is sparse, quantised or without values; only plain tensors are read.")

    if all(name.startswith("module.") for name in weights):
        weights = {name.removeprefix("module."): value for name, value in weights.items()}
    copies = {"ema_" + name.replace(".", "_") for name in weights}
    for name in [name for name in weights if name in copies]:
        dropped[name] = "weight that was not averaged; the plain name holds the moving average"
        del weights[name]

    meta = content.get("meta") if entry is not None else None
    meta = meta if isinstance(meta, Mapping) else {}
    text = meta.get("config") or meta.get("cfg")
    return PublicCheckpoint(weights, _class_names(meta), stated_settings(text) if text else {}, dropped)


def stated_settings(text: str) -> dict[str, list]:
    """Collect the settings of a configuration written as Python code, which is parsed and never run.

    Args:
        text (`str`): mmdetection's dump of its configuration.

    Returns:
        `dict[str, list]`: by name of a keyword argument, wherever in the text, the different literal values it has.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, TypeError, ValueError):
        return {}
    found: dict[str, list] = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.keyword) or node.arg is None:
            continue
        try:
            value = ast.literal_eval(node.value)
        except ValueError:
            continue
        if value not in found.setdefault(node.arg, []):
            found[node.arg].append(value)
    return found


def _holds_tensors(value: Any) -> bool:
    waiting, seen = [value], set()  # a file of others may hold a list that holds itself
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            return True
        if isinstance(value, Mapping | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(value.values() if isinstance(value, Mapping) else value)
    return False


def _class_names(meta: Mapping[str, Any]) -> list[str] | None:
    """Return the names in mmdetection's `CLASSES`, or where mmdetection 3 keeps them."""
    data = meta.get("dataset_meta")
    data = data if isinstance(data, Mapping) else {}
    names = meta.get("CLASSES") or data.get("classes") or data.get("CLASSES")
    if isinstance(names, str):
        return [names]
    return list(map(str, names)) if isinstance(names, list | tuple) and names else None
