"""Imports point downwards only, and the folder that the Hub receives as remote code stays flat and light."""

import ast
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest


SOURCE = Path(__file__).parents[1] / "src" / "drmm_hf"
# Which rooms each room may import, besides itself. A room is a folder or a file of the package.
ALLOWED = {
    "__init__": {"modeling"},
    "__main__": {"cli"},
    "cli": {"commands"},
    "commands": {
        "modeling",
        "data",
        "evaluation",
        "training",
        "conversion",
        "export",
        "visualization",
        "hub",
        "benchmarks",
        "demo",
    },
    "demo": {"modeling", "data", "evaluation", "conversion", "visualization"},
    "benchmarks": {"modeling", "data", "evaluation", "training", "conversion", "export", "visualization"},
    "training": {"modeling", "data", "evaluation", "conversion", "visualization"},
    "evaluation": {"data"},
    "conversion": {"modeling"},
    "export": {"modeling", "data", "evaluation", "conversion"},
    "hub": {"modeling", "evaluation", "conversion", "training", "visualization"},
    "data": set(),
    "visualization": set(),
    "modeling": set(),
}
# Narrower or wider for one file: it needs the mixture's density, and nothing else of the model.
EXCEPTIONS = {"evaluation/likelihood.py": {"modeling.mixture"}}
MODELING_MAY_IMPORT = {"torch", "torchvision", "transformers", "huggingface_hub.dataclasses"}


def imports(path: Path):
    """Yield (line, absolute name of the imported module or object), wherever in the file the import stands."""
    package = ["drmm_hf", *path.relative_to(SOURCE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


FILES = sorted(SOURCE.rglob("*.py"))
NAMES = [str(path.relative_to(SOURCE)) for path in FILES]


def test_every_room_is_in_the_table():
    assert len(FILES) > 20
    assert {name.removesuffix(".py").split("/")[0] for name in NAMES} <= ALLOWED.keys()


@pytest.mark.parametrize("name", NAMES)
def test_imports_point_downwards(name):
    room = name.removesuffix(".py").split("/")[0]
    for line, imported in imports(SOURCE / name):
        if not imported.startswith("drmm_hf."):
            continue
        target = imported.removeprefix("drmm_hf.")
        exception = any(target.startswith(f"{module}.") for module in EXCEPTIONS.get(name, ()))
        assert target.split(".")[0] in ALLOWED[room] | {room} or exception, f"{name}:{line} imports {imported}"


@pytest.mark.parametrize("name", NAMES)
def test_everything_of_ours_that_is_imported_exists(name):
    """Imports inside functions, too, which no test of the function's file may reach."""
    for line, imported in imports(SOURCE / name):
        if imported.startswith("drmm_hf.") and not (
            imported.startswith("drmm_hf.demo.app") and not find_spec("gradio")
        ):
            assert exists(imported), f"{name}:{line} imports {imported}"


def exists(imported: str) -> bool:
    """Return whether a module or something in a module can be imported."""
    module, _, attribute = imported.rpartition(".")
    try:
        return hasattr(import_module(module), attribute) or bool(import_module(imported))
    except ImportError:
        return False


def test_what_is_stale_is_noticed():
    assert exists("drmm_hf.data.coco") and exists("drmm_hf.data.coco.save_coco")
    assert not exists("drmm_hf.data.coco.no_such") and not exists("drmm_hf.no_such.save_coco")


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("modeling/")])
def test_modeling_is_flat_and_imports_only_what_the_hub_has(name):
    siblings = {path.stem for path in (SOURCE / "modeling").glob("*.py")}
    for node in ast.walk(ast.parse((SOURCE / name).read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            where = f"{name}:{node.lineno}"
            assert node.level == 1 and node.module in siblings, f"{where}: only `from .sibling import name`"
    guarded = guarded_lines(SOURCE / name)
    for line, imported in imports(SOURCE / name):
        allowed = any(f"{imported}.".startswith(f"{module}.") for module in MODELING_MAY_IMPORT)
        own = imported.startswith("drmm_hf.modeling.")
        package = imported.split(".")[0]
        assert allowed or own or package in sys.stdlib_module_names | guarded.get(line, set()), (
            f"{name}:{line}: {imported}"
        )


def guarded_lines(path: Path) -> dict[int, set[str]]:
    """Return the packages that each line may import because it stands under `if is_PACKAGE_available():`."""
    lines = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Call) and isinstance(node.test.func, ast.Name):
            package = node.test.func.id.removeprefix("is_").removesuffix("_available")
            for line in range(node.body[0].lineno, node.body[-1].end_lineno + 1):
                lines.setdefault(line, set()).add(package)
    return lines


def test_modeling_has_no_folders():
    assert not [path for path in (SOURCE / "modeling").iterdir() if path.is_dir() and path.name != "__pycache__"]


def test_targets_are_the_only_place_with_lists_of_images():
    """The criteria loop over stages and named terms; over images only where labels are checked and padded."""
    loops = {}
    for function in ast.parse((SOURCE / "modeling" / "criteria.py").read_text()).body:
        if isinstance(function, ast.FunctionDef):
            kinds = (ast.For, ast.While, ast.comprehension)
            iterated = [ast.unparse(n.iter) for n in ast.walk(function) if isinstance(n, kinds) and hasattr(n, "iter")]
            loops[function.name] = " ".join(iterated)
    assert {name for name, iterated in loops.items() if "labels" in iterated} == {"check_labels", "pad_targets"}
    assert "nll_mcm" in loops and "targets" not in " ".join(loops.values())
