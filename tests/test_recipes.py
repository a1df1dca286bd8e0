"""The paper's recipes hold the paper's numbers, and every row of its tables is a recipe and overrides that load."""

import argparse
import dataclasses
import math
import pkgutil
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
import torch

from conftest import STAGES
from drmm_hf import DrmmConfig, DrmmForObjectDetection
from drmm_hf.commands.train import add_arguments, parse_fields, read_rest
from drmm_hf.training.arguments import DataArguments, TrainingArguments, load_recipe
from drmm_hf.training.optimizer import schedule_factor


ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "scripts" / "recipes"

# Method: learning rate, weight decay, epoch of the first drop, batch norms of a ResNet, initial grid, loss weight.
METHODS = {
    "drmm_sparse_rcnn": (5e-5, 5e-5, 27, "train", [15, 20], 2.0),
    "sparse_rcnn": (2.5e-5, 1e-4, 27, "eval", None, 1.0),
    "drmm_adamixer": (2.5e-5, 1e-4, 24, "train", None, 2.0),
    "adamixer": (2.5e-5, 1e-4, 24, "eval", None, 1.0),
}
# Backbone: warm-up steps, frozen stages, drop path, weights to start from.
BACKBONES = {
    "r50": (500, 1, None, "timm/resnet50.tv_in1k"),
    "r101": (500, 1, None, "timm/resnet101.tv_in1k"),
    "swin_t": (1000, 0, 0.2, "microsoft/swin-tiny-patch4-window7-224"),
}
# AP AP50 AP75 APs APm APl of Table 5.
TABLE_5 = {
    "sparse_rcnn_r50": "45.0 64.1 49.0 27.8 47.6 59.7",
    "sparse_rcnn_r101": "46.4 65.6 50.7 28.6 49.4 61.3",
    "sparse_rcnn_swin_t": "47.4 67.1 52.0 30.1 50.3 63.1",
    "adamixer_r50": "47.0 66.0 51.1 30.1 50.2 61.8",
    "adamixer_r101": "48.0 67.0 52.4 30.0 51.2 63.7",
    "adamixer_swin_t": "48.9 68.5 53.5 31.5 52.0 64.2",
    "drmm_sparse_rcnn_r50": "47.0 64.8 51.6 30.5 50.4 61.1",
    "drmm_sparse_rcnn_r101": "48.0 65.7 52.6 30.4 51.4 63.5",
    "drmm_sparse_rcnn_swin_t": "49.9 68.1 55.1 32.1 53.6 64.6",
    "drmm_adamixer_r50": "48.4 66.3 52.8 31.0 52.1 64.0",
    "drmm_adamixer_r101": "49.2 67.3 53.5 31.4 53.1 65.4",
    "drmm_adamixer_swin_t": "50.7 69.0 55.5 33.5 54.4 66.3",
}
TABLE_11 = {"sparse_rcnn_r50_group": "45.9", "adamixer_r50_group": "47.4"}
PAPER = [*TABLE_5, *TABLE_11]

# Parameters as the public checkpoints have them, by part.
IN_BACKBONE = {"r50": 23_508_032, "r101": 42_500_160, "swin_t": 27_520_698}
FROZEN_IN_RESNETS = 225_344  # stem and first stage
IN_NECK = {
    ("sparse_rcnn", "resnet"): 3_344_384,
    ("sparse_rcnn", "swin"): 2_729_984,
    ("adamixer", "resnet"): 984_576,
    ("adamixer", "swin"): 370_176,
}
IN_QUERIES = 78_000  # of a group; AdaMixer's 1,200 box entries never get a gradient
IN_STAGES = {"sparse_rcnn": 79_412_472, "adamixer": 110_272_296}
OF_OBJECTNESS_AND_SCALES = 7_710
UNUSED_IN_SWIN = 1_536  # the norm before transformers' pooled output, which no public checkpoint has
# As stated for the public checkpoints and in Table 11.
TOTALS = {
    "drmm_sparse_rcnn_r50": 106_350_598,
    "drmm_sparse_rcnn_r101": 125_342_726,
    "sparse_rcnn_r50": 106_342_888,
    "sparse_rcnn_r101": 125_335_016,
    "adamixer_r50": 134_842_904,
    "adamixer_r101": 153_835_032,
}
TRAINABLE = {  # in millions: 106.1, 106.1, 134.6, 107.0, 135.5
    "drmm_sparse_rcnn_r50": 106_125_254,
    "sparse_rcnn_r50": 106_117_544,
    "adamixer_r50": 134_617_560,
    "sparse_rcnn_r50_group": 106_975_544,
    "adamixer_r50_group": 135_475_560,
}


def parts(name):
    """Split a recipe's name: method, decoder, backbone, number of query groups."""
    method, backbone, group = re.fullmatch(r"(\w+?)_(r50|r101|swin_t)(_group)?", name).groups()
    return method, method.removeprefix("drmm_"), backbone, 12 if group else 1


def header(name):
    return [line for line in (RECIPES / f"{name}.yaml").read_text().splitlines() if line.startswith("#")]


def read_command(words):
    """Read what stands after `drmm train`: the recipe with all overrides, and the options that have names."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args, rest = parser.parse_known_args(words)
    args.recipe, fields = read_rest(rest)
    return load_recipe(ROOT / args.recipe, fields), args


@pytest.mark.parametrize("name", PAPER)
def test_training_is_the_papers(name):
    method, _, backbone, _ = parts(name)
    learning_rate, weight_decay, first_drop, *_ = METHODS[method]
    warmup_steps, *_ = BACKBONES[backbone]
    training = load_recipe(RECIPES / f"{name}.yaml").training
    assert (training.learning_rate, training.weight_decay) == (learning_rate, weight_decay)
    assert (training.epochs, training.max_steps, training.max_minutes) == (36, None, None)
    assert (training.max_grad_norm, training.betas, training.backbone_lr_factor) == (1.0, [0.9, 0.999], 1.0)
    assert (training.mixed_precision, training.ema_decay) == ("no", None)
    assert [schedule_factor(training, step, 0.5) for step in (0, warmup_steps)] == [0.001, 1.0]
    assert schedule_factor(training, warmup_steps - 1, 0.5) < 1.0
    steps_per_epoch = 7393  # 118,287 pictures in steps of 16
    for epoch, before, after in ((first_drop, 1.0, 0.1), (33, 0.1, 0.01)):
        done = [(epoch * steps_per_epoch + steps) / (36 * steps_per_epoch) for steps in (-1, 0)]
        assert [schedule_factor(training, 10**6, share) for share in done] == pytest.approx([before, after])


@pytest.mark.parametrize("name", PAPER)
def test_pictures_are_the_papers(name):
    assert load_recipe(RECIPES / f"{name}.yaml").data == DataArguments(
        train_split="train2017",
        val_split="val2017",
        shortest_edge=800,
        longest_edge=1333,
        augmentation="paper",
        horizontal_flip=0.5,
        short_edges=[480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800],
        crop_short_edges=[400, 500, 600],
        crop_sizes=[384, 600],
        invalid_data="skip",
    )


@pytest.mark.parametrize("name", PAPER)
def test_models_are_the_papers(name):
    method, decoder, backbone, groups = parts(name)
    *_, norm, grid, loss_weight = METHODS[method]
    _, frozen_stages, drop_path, _ = BACKBONES[backbone]
    config = DrmmConfig(**load_recipe(RECIPES / f"{name}.yaml").model)
    is_drmm = method.startswith("drmm")
    assert (config.decoder_type, config.head_type) == (decoder, "mixture" if is_drmm else "box")
    assert config.criterion == ("nll_mcm" if is_drmm else "focal_l1_giou")
    assert config.neck_type == {"sparse_rcnn": "fpn", "adamixer": "channel_mapping"}[decoder]
    assert (config.num_queries, config.num_query_groups, config.proposal_grid) == (300, groups, grid)
    assert (config.loss_weight, config.freeze_backbone_stages) == (loss_weight, frozen_stages)
    assert (config.num_stages, config.num_labels, config.dropout, config.box_delta_unit) == (6, 80, 0, "pixels")
    if is_drmm:
        assert (config.mcm_weight, config.mcm_stop_gradient, config.coordinate_distribution) == (0.5, ["F"], "cauchy")
    if drop_path is None:
        assert config.backbone_norm == norm
    else:
        assert config.backbone_config.drop_path_rate == drop_path


@pytest.mark.parametrize("name", PAPER)
def test_models_have_the_parameters_of_the_public_checkpoints(name):
    method, decoder, backbone, groups = parts(name)
    family = "swin" if backbone == "swin_t" else "resnet"
    with torch.device("meta"):
        model = DrmmForObjectDetection(DrmmConfig(**load_recipe(RECIPES / f"{name}.yaml").model))
    total = sum(parameter.numel() for parameter in model.parameters())
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    public = IN_BACKBONE[backbone] + IN_NECK[decoder, family] + groups * IN_QUERIES + IN_STAGES[decoder]
    public += OF_OBJECTNESS_AND_SCALES if method.startswith("drmm") else 0
    assert total == public + (UNUSED_IN_SWIN if family == "swin" else 0)
    never_trained = 1_200 * groups if decoder == "adamixer" else 0
    public_trainable = public - (FROZEN_IN_RESNETS if family == "resnet" else 0)
    assert trainable == public_trainable - never_trained
    assert TOTALS.get(name, public) == public and TRAINABLE.get(name, public_trainable) == public_trainable


SIZES_OF_TINY = [96, 192, 384, 768]


@pytest.mark.parametrize(
    ("name", "backbone", "count"),
    [
        (
            "adamixer_swin_t",
            {"model_type": "swin", "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24], "out_features": STAGES},
            159_559_074 + UNUSED_IN_SWIN,  # Swin-S, of which a public checkpoint exists
        ),
        (
            "drmm_sparse_rcnn_swin_t",
            {"model_type": "convnext", "depths": [3, 3, 9, 3], "hidden_sizes": SIZES_OF_TINY, "out_features": STAGES},
            28_589_128 - 769_000 - 2 * 768 + 2 * sum(SIZES_OF_TINY)  # ConvNeXt-T: no classifier, norms of the maps
            + IN_NECK["sparse_rcnn", "swin"] + IN_QUERIES + IN_STAGES["sparse_rcnn"] + OF_OBJECTNESS_AND_SCALES,
        ),
        (
            "adamixer_r50",
            {"model_type": "timm_backbone", "backbone": "tf_efficientnet_lite0", "out_indices": [1, 2, 3, 4]},
            4_652_008 - 1_281_000 - 320 * 1280 - 2 * 1280  # Lite0 without classifier and the layer before it
            + (24 + 40 + 112 + 320) * 256 + 4 * 256 + 2 * 256 + IN_QUERIES + IN_STAGES["adamixer"],
        ),
    ],
    ids=["swin_s", "convnext_t", "lite0"],
)  # fmt: skip
def test_other_backbones_are_an_override(name, backbone, count):
    recipe = load_recipe(RECIPES / f"{name}.yaml", {"backbone_config": backbone})
    with torch.device("meta"):
        model = DrmmForObjectDetection(DrmmConfig(**recipe.model))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize("name", PAPER)
def test_headers_state_the_papers_figures_and_a_command_that_is_this_recipe(name):
    method, _, backbone, _ = parts(name)
    lines = header(name)
    said = " ".join(line.lstrip("# ") for line in lines)
    expected = said.partition("Expected: ")[2].partition(" on COCO val2017")[0]
    figures = re.findall(r"(?:AP|AP50|AP75|APs|APm|APl) ([\d.]+)", expected)
    assert " ".join(figures) == (TABLE_5 | TABLE_11)[name]
    assert "Paper: Table" in said and "not measured here" in said
    assert ("Learning rate not stated in the paper" in said) == (method == "drmm_adamixer")

    (start,) = (index for index, line in enumerate(lines) if line.startswith("# Command: "))
    command = lines[start].removeprefix("# Command: ").removesuffix("\\") + lines[start + 1].lstrip("# ")
    launch, _, arguments = command.partition(" scripts/train.py ")
    recipe, args = read_command(shlex.split(arguments))
    assert (ROOT / args.recipe, args.backbone_weights) == (RECIPES / f"{name}.yaml", BACKBONES[backbone][3])
    assert args.output == recipe.training.output_dir == f"runs/{name}"
    processes = int(re.fullmatch(r"accelerate launch --num_processes (\d+)", launch).group(1))
    assert processes * recipe.training.batch_size * recipe.training.accumulation_steps == 16


def test_groups_change_nothing_else():
    for name in TABLE_11:
        group, plain = (load_recipe(RECIPES / f"{name.removesuffix(end)}.yaml") for end in ("", "_group"))
        assert group.model.pop("num_query_groups") == 12
        group.training.output_dir = plain.training.output_dir
        assert group == plain


CONCEPTS = (ROOT / "docs" / "concepts.md").read_text()
EVERY_ROW = CONCEPTS.partition("## Every row as a recipe")[2].partition("\n## ")[0]


def tables(text):
    """Split markdown into tables: lists of rows, each a list of cells, the line under the header left out."""
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in block.splitlines()]
        yield [rows[0], *rows[2:]]


def code_spans(text):
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def recipes_of_rows():
    """Read the recipes and overrides of a section: single ones, and tables with overrides in rows and columns."""
    matrices = []
    for header, *rows in tables(EVERY_ROW):
        if header[0].startswith("`"):
            (recipe,), *columns = map(code_spans, header)
            matrices += [" ".join([recipe, *code_spans(row[0]), *column]) for row in rows for column in columns]
    outside = EVERY_ROW
    for row in re.findall(r"^\| `.*\n", EVERY_ROW, re.MULTILINE):
        outside = outside.replace(row, "")
    return sorted({span for span in code_spans(outside) if re.match(r"\w+\.yaml", span)} | set(matrices))


def test_every_row_of_the_papers_tables_is_there():
    """12 of Tables 1, 5, 6; 3 more of Table 2, 1 of 3, 3 of 7, 16 of 8, 3 of 10, 2 of 11; 5 of Figures 11 and 12."""
    rows = recipes_of_rows()
    assert len(rows) == 12 + 3 + 1 + 3 + 16 + 3 + 2 + 5
    assert {row for row in rows if " " not in row} == {f"{name}.yaml" for name in PAPER}


@pytest.mark.parametrize("row", recipes_of_rows())
def test_every_row_of_the_papers_tables_loads(row):
    recipe, args = read_command(shlex.split(f"scripts/recipes/{row}"))
    plain = load_recipe(ROOT / args.recipe)
    given = parse_fields(shlex.split(row)[1:])
    assert (recipe.data, recipe.training) == (plain.data, plain.training)
    changed = {name for name in recipe.model if recipe.model[name] != plain.model.get(name)}
    assert changed <= {name.replace("-", "_") for name in given}
    config = DrmmConfig(**recipe.model)
    assert config.num_queries == math.prod(config.proposal_grid or [config.num_queries])


def test_rows_differ_from_each_other():
    configs = [str(read_command(shlex.split(f"scripts/recipes/{row}"))[0].model) for row in recipes_of_rows()]
    assert len(set(configs)) == len(configs) - 2  # 0.5 at 300 queries of Table 8 and F alone of Table 7 are the recipe


COMMANDS = sorted(
    {span for span in code_spans(CONCEPTS) if span.startswith("drmm ") and len(span.split()) > 2 and "..." not in span}
    | {line for line in CONCEPTS.splitlines() if line.startswith("drmm ")}
)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_in_the_concepts_are_understood(command):
    _, name, *words = shlex.split(command)
    parser = argparse.ArgumentParser()
    import_module(f"drmm_hf.commands.{name}").add_arguments(parser)
    args = parser.parse_args(words)
    assert getattr(args, "split", "val2017") in ("val", "val2017")


def test_the_example_trains_the_row_that_it_evaluates():
    (training,) = re.findall(r"scripts/train\.py (.*)", CONCEPTS.replace("\\\n", ""))
    recipe, args = read_command(shlex.split(training))
    assert recipe.model["criterion"] == "nll" and args.data == "COCO"
    assert f"drmm evaluate {args.output}/best COCO " in CONCEPTS


def map_rows():
    for section in ("Equations", "Tables and figures"):
        text = CONCEPTS.partition(f"## {section}\n")[2].partition("\n## ")[0]
        for header, *rows in tables(text):
            assert header == ["paper", "what", "code", "test"]
            yield from rows


@pytest.mark.parametrize("row", map_rows(), ids=lambda row: row[0])
def test_the_map_from_paper_to_code_names_what_exists(row):
    _, what, code, test = row
    sections = (DrmmConfig, DataArguments, TrainingArguments)
    fields = {field.name for section in sections for field in dataclasses.fields(section)}
    assert what and code_spans(test)
    for span in code_spans(code):
        if "." in span and not span.startswith("drmm "):
            pkgutil.resolve_name(f"drmm_hf.{span}")
        else:
            assert span in fields or span in COMMANDS
    for span in code_spans(test):
        path, _, name = span.partition("::")
        if path.endswith(".py"):
            assert re.search(rf"(def|class) {name}\b", (ROOT / "tests" / path).read_text()), span


def test_the_map_leaves_out_no_equation_table_or_figure():
    named = " ".join(row[0] for row in map_rows())
    for kind, last in (("Eq", 11), ("Table", 11), ("Fig", 15)):
        numbers = set()
        for listed in re.findall(rf"{kind}s?\.? ([\d, -]+)", named):
            for part in listed.split(","):
                ends = [int(number) for number in part.strip().split("-") if number]
                numbers |= set(range(ends[0], ends[-1] + 1)) if ends else set()
        assert numbers == set(range(1, last + 1)), kind
