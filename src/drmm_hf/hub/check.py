"""Check a folder before it is published: weights, settings, code, card, and that nothing private is in it."""

from __future__ import annotations

import ast
import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from huggingface_hub import EvalResult
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_imports

from ..evaluation.files import read_json
from ..evaluation.origin import weight_files
from ..modeling import image_processing_drmm, modeling_drmm
from ..modeling.configuration_drmm import DrmmConfig
from ..modeling.image_processing_drmm import DrmmImageProcessor
from ..modeling.modeling_drmm import DrmmForObjectDetection
from ..modeling.remote_code import AUTO_MAPS, requirements
from .card import check_card


# What a published folder may hold; checkpoints of optimizers, random states and pickles are nothing of these.
_SUFFIXES = {".json", ".safetensors", ".py", ".txt", ".md", ".yaml", ".png", ".jpg"}


def check_folder(
    folder: str | Path, expected: Sequence[EvalResult] | None = None, private: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """Check all that can be checked without the Hub.

    Args:
        folder (`str` or `Path`): As it is to be uploaded.
        expected (`Sequence[EvalResult]`, *optional*): What the model-index of the card should hold.
        private (`Sequence[str]`): Texts that must not be in any file but weights and pictures.

    Returns:
        `tuple[list[str], list[str]]`: What was checked, a line each, and what a reader should know.

    Raises:
        ValueError: If something is wrong; the message says what.
    """
    folder = Path(folder)
    config, processor = _settings(folder)
    count = _check_weights(folder, config)
    lines = [f"weights: {count:,} tensors of safetensors, all finite, those of the model"]
    lines.append("settings: config.json and preprocessor_config.json are read, and name their code")
    modules = _check_code(folder)
    difference = _check_remote_code(folder, config)
    lines.append(
        f"code: {modules} modules in one flat folder, requirements.txt; apart from drmm_hf it gives the same outputs "
        f"(largest difference {difference:.0e})"
    )
    notes = check_card((folder / "README.md").read_text(encoding="utf-8"), expected)
    lines.append("card: its header is one that huggingface_hub takes")
    _check_privacy(folder, private)
    lines.append("files: no training state, no pickles, no places of this machine")
    return lines, notes


def _settings(folder: Path) -> tuple[DrmmConfig, DrmmImageProcessor]:
    try:
        for name in AUTO_MAPS:
            if not isinstance(read_json(folder / name), dict):
                raise ValueError(f"{name} is no json object")
        config = DrmmConfig.from_pretrained(folder)
        processor = DrmmImageProcessor.from_pretrained(folder)
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        raise ValueError(f"{folder} has settings that cannot be read: {error}") from error
    thresholds = processor.score_threshold
    if isinstance(thresholds, list) and len(thresholds) != config.num_labels:
        raise ValueError(f"{folder}: score_threshold has {len(thresholds)} entries for {config.num_labels} classes")
    for name, auto_map in AUTO_MAPS.items():
        if json.loads((folder / name).read_text(encoding="utf-8")).get("auto_map") != auto_map:
            raise ValueError(f"{folder / name} does not name its code in auto_map")
    return config, processor


def _check_weights(folder: Path, config: DrmmConfig) -> int:
    """Compare the tensors with those of a model of this config; return how many there are."""
    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in DrmmForObjectDetection(config).state_dict().items()}
    found, broken = {}, []
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118, it is no mapping
                    tensor = file.get_tensor(name)
                    found[name] = tuple(tensor.shape)
                    if tensor.is_floating_point() and not tensor.isfinite().all():
                        broken.append(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
    problems = {
        "missing": expected.keys() - found.keys(),
        "not of the model": found.keys() - expected.keys(),
        "of another shape": {name for name in found.keys() & expected.keys() if found[name] != expected[name]},
        "not finite": set(broken),
    }
    said = [f"{len(names)} tensors are {what}, such as {min(names)}" for what, names in problems.items() if names]
    if said:
        raise ValueError(f"the weights cannot be published: {'; '.join(said)}")
    return len(found)


def _check_code(folder: Path) -> int:
    """Check that the modules are there, import one another and nothing that is not required; return how many."""
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    required = requirements(settings)
    text = "".join(f"{package}{versions}\n" for package, versions in required.items())
    if (folder / "requirements.txt").read_text(encoding="utf-8") != text:
        raise ValueError(f"{folder / 'requirements.txt'} is not {text.split()}")
    modules = sorted(folder.glob("*.py"))
    known = {*sys.stdlib_module_names, *required, "huggingface_hub"}  # which transformers brings
    for path in modules:
        others = set(get_imports(path)) - known
        if others:
            raise ValueError(f"{path.name} imports {', '.join(sorted(others))}, which requirements.txt does not have")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            if node.level > 1 or not (folder / f"{node.module}.py").is_file():
                raise ValueError(f"{path.name} imports {'.' * node.level}{node.module or ''}, which is not beside it")
    return len(modules)


@torch.no_grad()
def _check_remote_code(folder: Path, config: DrmmConfig) -> float:
    """Run the folder's own code beside this package's; return how far their outputs are from one another."""
    picture = torch.randint(0, 256, (3, 120, 160), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with _modules_of(folder) as bundle:
        remote = _outputs(bundle("modeling_drmm"), bundle("image_processing_drmm"), folder, picture)
    here = _outputs(modeling_drmm, image_processing_drmm, folder, picture)
    differences = [(remote[name] - here[name]).abs().max().item() for name in ("logits", "pred_boxes")]
    if not max(differences) < 1e-4:
        raise ValueError(f"the code in {folder} gives other outputs than drmm_hf, by {max(differences):.1e}")
    return max(differences)


def _outputs(modeling: ModuleType, processing: ModuleType, folder: Path, picture: torch.Tensor) -> dict:
    model = modeling.DrmmForObjectDetection.from_pretrained(folder, dtype=torch.float32).eval()
    return model(**processing.DrmmImageProcessor.from_pretrained(folder)(images=[picture], return_tensors="pt"))


@contextmanager
def _modules_of(folder: Path) -> Iterator:
    """Give a function that imports a module of a folder, apart from those of this package; nothing of it remains."""
    name, writes = "_drmm_bundle", sys.dont_write_bytecode
    package = ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name], sys.dont_write_bytecode = package, True
    importlib.invalidate_caches()
    try:
        yield lambda module: importlib.import_module(f"{name}.{module}")
    except ImportError as error:
        raise ValueError(f"the code in {folder} cannot be imported: {error}") from error
    finally:
        sys.dont_write_bytecode = writes
        for module in [module for module in sys.modules if module.partition(".")[0] == name]:
            del sys.modules[module]


def _check_privacy(folder: Path, private: Sequence[str]) -> None:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or (path.is_file() and path.suffix not in _SUFFIXES):
            raise ValueError(f"{name} in {folder} is no file to be published")
        if path.suffix in {".safetensors", ".png", ".jpg"} or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8")
        for secret in private:
            if secret in text:
                raise ValueError(f"{name} in {folder} holds {secret!r}, a place of this machine; take it out")
