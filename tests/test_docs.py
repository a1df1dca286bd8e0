"""What the documents say is run: their Python, their command lines, the recipes, the links."""

import argparse
import json
import re
import shlex
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from conftest import tiny_config
from drmm_cli import COMMANDS
from drmm_hf import DrmmConfig, DrmmForObjectDetection, DrmmImageProcessor
from drmm_hf.commands.train import read_rest
from drmm_hf.data.coco import save_coco
from drmm_hf.data.generated import CATEGORIES, generate_shapes
from drmm_hf.training.arguments import load_recipe
from drmm_hf.training.fields import recipe_fields


ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS += sorted((ROOT / "docs" / "api").glob("*.md"))
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
RECIPES = sorted((ROOT / "scripts" / "recipes").glob("*.yaml"))
RECIPES += [ROOT / "docs" / "notebooks" / "shapes_detector" / "recipe.yaml"]

# What a block may be in: code that runs or is read here, data, what a program printed, and Sphinx's own.
LANGUAGES = {"python", "bash", "yaml", "text", "bibtex"}
DIRECTIVES = {"{include}", "{toctree}", "{eval-rst}"}
SYNOPSIS = "a synopsis"


class Block(NamedTuple):
    """A block of code; `reason` says why it is not run, "" if it is."""

    language: str
    reason: str
    code: str


def blocks(text):
    """Read the blocks of a page, each with the comment `<!-- not run: REASON -->` right before it."""
    found = re.findall(r"(?:^<!-- not run: (.*?) -->\n\s*)?^```(\S*)(.*?)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(language, reason, code) for reason, language, _, code in found]


def by_name(paths):
    return pytest.mark.parametrize("path", paths, ids=[str(path.relative_to(ROOT)) for path in paths])


@by_name(DOCUMENTS)
def test_every_block_says_what_it_is_and_every_reason_belongs_to_one(path):
    text = path.read_text()
    found = blocks(text)
    assert len(re.findall(r"^```", text, re.MULTILINE)) == 2 * len(found)
    assert {block.language for block in found} <= LANGUAGES | DIRECTIVES
    reasons = re.findall(r"^<!-- not run:", text, re.MULTILINE)
    assert len(reasons) == sum(bool(block.reason) for block in found)
    assert all(len(block.reason) > 9 for block in found if block.reason)


# Python: the blocks of a page run in their order, in one namespace and in a folder with tiny things of these names.


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """Go to a folder with the models, the data and the picture that pages speak of."""
    monkeypatch.chdir(tmp_path)
    Path("docs").symlink_to(ROOT / "docs")
    for seed, split in enumerate(("train", "val", "test")):
        save_coco(generate_shapes(4, seed, (64, 64), num_objects=(1, 3)), "FOLDER", split)
    generate_shapes(1, 9)[0]["image"].save("picture.jpg")
    torch.manual_seed(0)
    names = {label: category["name"] for label, category in enumerate(CATEGORIES)}
    model = DrmmForObjectDetection(tiny_config(id2label=names, category_ids=[one["id"] for one in CATEGORIES]))
    model.save_pretrained("runs/mine/best")
    DrmmImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained("runs/mine/best")
    return tmp_path


def check_use_of_a_model(scope):
    result = scope["result"]
    assert {"scores", "labels", "boxes", "box_scales"} <= result.keys()
    assert len(result["scores"]) == len(result["boxes"]) > 5 and (result["scores"] > 0.5).all()


def check_own_decoder(scope):
    assert scope["losses"][-1] < 0.5 * scope["losses"][0]
    assert (scope["scores"] > 0.5).all()
    boxes, best = scope["mixture"].boxes, scope["best"]
    expected = scope["targets"].boxes
    distance = (boxes[range(2), best][:, None] - expected).abs().amax(-1)
    distance[0, 1] = torch.inf  # padding
    assert (distance.min(-1).values < 4).all()

    # The criterion of one's own: D-RMM's terms as they are, and its own for every stage.
    names = {f"{name}.stage{stage}" for name in ("nll", "mcm", "l1") for stage in range(2)}
    outputs = scope["outputs"]
    assert scope["parts"].keys() == outputs.loss_dict.keys() == names
    assert 0 < scope["parts"]["l1.stage1"] < 0.5 < outputs.loss_dict["l1.stage1"]
    weights = {"nll": 1, "mcm": 0.5, "l1": 1}
    total = sum(weights[name.split(".")[0]] * value for name, value in outputs.loss_dict.items())
    torch.testing.assert_close(outputs.loss, total)


# What must hold of the names that a page has defined, beyond that its lines run.
CHECKS = {"README.md": check_use_of_a_model, "docs/own_decoder.md": check_own_decoder}


def python_of(path):
    return [block.code for block in blocks(path.read_text()) if block.language == "python" and not block.reason]


@by_name([path for path in DOCUMENTS if python_of(path)])
def test_the_python_of_a_page_runs(path, workplace):
    there, scope = {one.name for one in workplace.iterdir()}, {}
    for code in python_of(path):
        exec(compile(code, path.name, "exec"), scope)
    CHECKS.get(str(path.relative_to(ROOT)), lambda scope: None)(scope)
    if path.name == "getting_started.md":  # read in a clone, whose git should have nothing to report
        assert {one.name for one in workplace.iterdir()} == there


# Command lines: understood by the parsers of the programs that they name.


def command_lines(code):
    """Yield the words of each command, without variables set before it."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            del words[0]
        if words[:2] == ["taskset", "-c"]:
            del words[:3]
        if words:
            yield words


def parser_of(command):
    parser = argparse.ArgumentParser(prog=command, allow_abbrev=False)
    import_module(f"drmm_hf.commands.{command}").add_arguments(parser)
    return parser


def understand_drmm(words):
    """Parse the arguments of `drmm`, fields of recipes and the recipe itself included."""
    try:
        args, rest = parser_of(words[0]).parse_known_args(words[1:])
    except SystemExit as exit_:  # 0 where something was to be printed, as by --help
        assert exit_.code == 0, f"drmm {shlex.join(words)}"
        return
    if not rest:
        return
    assert hasattr(args, "fields"), f"drmm {words[0]} does not know {rest}"
    recipe, fields = read_rest(rest)
    known = {field.option for field in recipe_fields()}
    assert {f"--{name}" for name in fields} <= known
    if recipe is not None and not recipe.isupper() and recipe != "RECIPE.yaml":
        load_recipe(ROOT / recipe, fields)


def understand_python(words):
    """Find the module or script, and its options among its text."""
    if words[0] == "-m":
        assert words[1] in ("pytest", "venv") and all((ROOT / one).exists() for one in words[2:] if "/" in one)
        return
    source, options = (ROOT / words[0]).read_text(), [word[2:] for word in words if word.startswith("--")]
    assert all(re.search(f'"(--)?{option}"', source) for option in options)


def understand_launch(words):
    """Parse accelerate's own arguments, then those of the script, which is a shim of a command."""
    assert words[0] == "launch"
    args = launch_command_parser().parse_args(words[1:])
    script = Path(args.training_script)
    assert (ROOT / script).is_file() and script.stem in COMMANDS
    understand_drmm([script.stem, *args.training_script_args])


def understand_make(words):
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{word}:", makefile, re.MULTILINE) for word in words)


def understand_pip(words):
    assert words[0] == "install"
    project = (ROOT / "pyproject.toml").read_text()
    extras = [extra for word in words for extra in re.findall(r"^(?:\.|drmm-hf)\[(.*)\]$", word)]
    for extra in ",".join(extras).split(","):
        assert not extra or re.search(rf"^{extra} = \[", project, re.MULTILINE), extra


PROGRAMS = {
    "drmm": understand_drmm,
    "python": understand_python,
    "accelerate": understand_launch,
    "make": understand_make,
    "pip": understand_pip,
}


def understand(words):
    if words[0] not in ("git", "cd", "cp", "mkdir", "source", "pre-commit"):
        PROGRAMS[words[0]](words[1:])


@by_name([path for path in DOCUMENTS if any(block.language == "bash" for block in blocks(path.read_text()))])
def test_command_lines_are_understood(path):
    for block in blocks(path.read_text()):
        if block.language == "bash" and not block.reason:
            for words in command_lines(block.code):
                understand(words)


@by_name([path for path in DOCUMENTS if SYNOPSIS in path.read_text()])
def test_the_options_of_a_synopsis_are_those_of_its_command(path):
    for block in blocks(path.read_text()):
        if block.reason == SYNOPSIS:
            for line in block.code.replace("\\\n", " ").replace("\n    ", " ").splitlines():
                program, command, *_ = line.split()
                assert program == "drmm"
                known = set(parser_of(command)._option_string_actions) | {"--field"}
                assert set(re.findall(r"--[a-z-]+", line)) <= known


@by_name([path for path in DOCUMENTS if "```text" in path.read_text()])
def test_commands_above_what_they_printed_are_understood(path):
    for block in blocks(path.read_text()):
        lines = re.sub(r"\\\n\s*", " ", block.code).splitlines() if block.language == "text" else []
        for line in lines:
            if re.match(r"(\$ )?(drmm|python) ", line):
                understand(shlex.split(line.removeprefix("$ "), comments=True))


@by_name([path for path in DOCUMENTS if "```yaml" in path.read_text()])
def test_yaml_is_a_config_of_accelerate(path, tmp_path):
    for block in blocks(path.read_text()):
        if block.language == "yaml":
            (tmp_path / "config.yaml").write_text(block.code)
            config = load_config_from_file(str(tmp_path / "config.yaml"))
            assert config.num_processes == yaml.safe_load(block.code)["num_processes"]


@by_name(NOTEBOOKS)
def test_notebooks_are_stripped_and_their_commands_understood(path):
    cells = json.loads(path.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells if "outputs" in cell)
    shell = [cell.removeprefix("%%bash\n") for cell in code if cell.startswith("%%bash\n")]
    assert shell
    for words in (words for cell in shell for words in command_lines(cell)):
        assert words[0] == "drmm"
        understand(words)
    for cell in code:
        if not cell.startswith("%%"):
            compile(cell, path.name, "exec")


@by_name(RECIPES)
def test_every_recipe_is_valid_and_builds_its_model(path):
    recipe = load_recipe(path)
    with torch.device("meta"):
        model = DrmmForObjectDetection(DrmmConfig(**recipe.model))
    assert sum(parameter.numel() for parameter in model.parameters()) > 0
    header = path.read_text().split("model:")[0]
    assert all(line.startswith("#") for line in header.strip().splitlines())
    assert all(f"# {word}: " in header for word in ("Expected", "Hardware", "Command"))


# Links.


def anchors(path):
    """Return the anchors that GitHub and the site give the headings of a page."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@by_name(DOCUMENTS)
def test_links_and_named_files_exist(path):
    text = path.read_text()
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    named = re.findall(r"(?:scripts|tests|docs|src)/[\w/.-]+\.(?:py|md|yaml)", text)
    missing = [name for name in named if not (ROOT / name).exists()]
    for module, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text):
        if not re.search(rf"(def|class) {name}\b", (ROOT / module).read_text()):
            missing.append(f"{module}::{name}")
    for link in links:
        place, _, anchor = link.partition("#")
        target = path.parent / place if place else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append(link)
    assert not missing


def test_every_page_is_in_the_table_of_contents():
    pages = {str(path.relative_to(ROOT / "docs").with_suffix("")) for path in [*DOCUMENTS[2:], *NOTEBOOKS]}
    listed = []
    for index in ("index.md", "api/index.md"):
        for block in blocks((ROOT / "docs" / index).read_text()):
            if block.language == "{toctree}":
                names = re.findall(r"^([\w/]+)$", block.code, re.MULTILINE)
                listed += [str(Path(index).parent / name) for name in names]
    assert sorted(listed) == sorted(pages - {"index"})
