"""The published tables are the paper's and name recipes that exist; results find their rows and no others."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drmm_hf.commands.tables import resolved_recipe
from drmm_hf.evaluation.origin import weights_digest
from drmm_hf.evaluation.paper_tables import (
    _BACKBONES,
    _SCALE,
    NO_RUN,
    find_results,
    measured_blocks,
    paper_table,
    recipe_overrides,
    recipe_parts,
    spread,
)
from drmm_hf.training.arguments import load_recipe


ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "scripts" / "recipes"
TABLES = [paper_table(number) for number in range(1, 12)]
CONCEPTS = (ROOT / "docs" / "concepts.md").read_text()


def test_the_paper_has_eleven_tables_with_these_rows():
    assert [len(table.rows) for table in TABLES] == [6, 5, 5, 2, 26, 13, 3, 16, 12, 10, 6]
    for number in (0, 12):
        with pytest.raises(ValueError, match=f"table is {number}; the paper has tables 1 to 11"):
            paper_table(number)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: f"table {table.number}")
def test_rows_are_whole_and_in_range(table):
    for row in table.rows:
        assert len(row.labels) == len(table.labels) and tuple(row.figures) == table.columns
        for name, value in row.figures.items():
            if name.startswith(("AP", "AR")):
                assert 10 < value < 75
    assert len({(row.labels, row.recipe, row.evaluation) for row in table.rows}) == len(table.rows)


def test_tables_agree_where_the_paper_repeats_itself():
    """47.0 of D-RMM stands in seven tables, 45.0 of Sparse R-CNN in five; AdaMixer differs in Table 11, as printed."""
    figures = {}
    for table in TABLES:
        if table.number != 6:
            for row in table.rows:
                default = row.recipe == 'drmm_sparse_rcnn_r50.yaml --mcm-stop-gradient "[F]"' or (
                    row.recipe
                    == 'drmm_sparse_rcnn_r50.yaml --mcm-weight 0.5 --num-queries 300 --proposal-grid "[15, 20]"'
                )
                recipe = "drmm_sparse_rcnn_r50.yaml" if default else row.recipe
                for name in ("AP", "AP50", "AP75", "AR"):
                    if name in row.figures and recipe and row.evaluation is None:
                        figures.setdefault((recipe, name), set()).add(row.figures[name])
    assert {key: values for key, values in figures.items() if len(values) > 1} == {
        ("adamixer_r50.yaml", "AP"): {46.6, 47.0}
    }
    four, nine = paper_table(4).rows, paper_table(9).rows
    assert [row.figures for row in four] == [
        {name: row.figures[name] for name in ("NLL", "exp(-MCM)")} for row in (nine[-1], nine[-2])
    ]


@pytest.mark.parametrize("column", ["NLL", "exp(-MCM)"])
def test_the_papers_ratios_follow_from_its_figures(column):
    rows = paper_table(9).rows
    for with_mcm, without in zip(rows[::2], rows[1::2], strict=True):
        ratio = without.figures[column] / with_mcm.figures[column]
        assert ratio == pytest.approx(without.figures[f"{column} ratio"], abs=0.0011)  # its parts are rounded


def published_recipes():
    return {row.recipe for table in TABLES for row in table.rows if row.recipe}


def recipes_in_the_concepts():
    text = CONCEPTS.partition("## Every row as a recipe")[2].partition("\n## ")[0]
    found = set()
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        rows = [re.findall(r"`([^`]+)`", line) for line in block.splitlines()]
        if block.startswith("| `"):
            recipe, *columns = rows[0]
            found |= {" ".join([recipe, column, row[0]]) for row in rows[2:] for column in columns}
        else:
            found |= {span for row in rows for span in row if re.match(r"\w+\.yaml", span)}
    return {recipe for recipe in found if "--top-k-ratio" not in recipe}  # those are of figures


def test_the_concepts_name_the_same_recipes():
    assert recipes_in_the_concepts() == published_recipes()


def test_the_concepts_state_the_same_figures():
    """Every figure beside a recipe in the concepts is one of that recipe's rows."""
    section = CONCEPTS.partition("## Every row as a recipe")[2].partition("\n## ")[0]
    number, checked = 0, 0
    for line in section.splitlines():
        number = int(re.match(r"\*\*Tables? (\d+)", line)[1]) if re.match(r"\*\*Table", line) else number
        if number == 8 and line.startswith("| `--num-queries"):
            queries, *cells = [cell.strip(" `") for cell in line.strip("|").split("|")]
            for row, cell in zip([row for row in paper_table(8).rows if queries in row.recipe], cells, strict=True):
                assert cell == " / ".join(f"{value:.1f}" for value in row.figures.values())
                checked += 1
        elif number in (2, 3, 7, 10) and (recipe := re.search(r"`(\w+\.yaml[^`]*)`", line)):
            stated = [float(value) for value in re.findall(r"\b(\d\d\.\d)\b", line)]
            rows = [row for row in paper_table(number).rows if row.recipe == recipe[1]]
            published = [value for row in rows for value in row.figures.values()]
            assert stated and (stated == published or number == 3 and stated == published[: len(stated)])
            checked += 1
        elif number in (1, 11):
            for ap, recipe in re.findall(r"(\d\d\.\d)(?:, [\d.]+)? `(\w+\.yaml)`", line):
                table = paper_table(5 if number == 1 else 11)
                assert float(ap) == next(row.figures["AP"] for row in table.rows if row.recipe == recipe)
                checked += 1
    assert checked >= 12 + 5 + 3 + 3 + 4 + 5 + 6


@pytest.mark.parametrize("recipe", sorted(published_recipes()))
def test_the_recipe_of_a_row_has_what_the_row_asks_for(recipe, tmp_path):
    overrides = {name: str(value) for name, value in recipe_overrides(recipe).items()}
    load_recipe(RECIPES / recipe.split()[0], overrides).save(tmp_path / "recipe.yaml")
    resolved = resolved_recipe(tmp_path)
    row = next(row for table in TABLES for row in table.rows if row.recipe == recipe)
    assert {name: resolved[name] for name in row.fields} == row.fields
    rest = {name: value for name, value in _SCALE.items() if name not in row.fields}
    assert {name: resolved[name] for name in rest} == rest
    backbones = {
        name
        for name, fields in _BACKBONES.items()
        if all(resolved["backbone_config"].get(field) == value for field, value in fields.items())
    }
    assert backbones == {recipe_parts(recipe)[1]}


def write_run(folder, recipe="drmm_sparse_rcnn_r50.yaml", overrides=(), summary=None, **files):
    folder.mkdir(parents=True)
    load_recipe(RECIPES / recipe, dict(overrides)).save(folder / "recipe.yaml")
    files["summary"] = {"steps": 100, "training_seconds": 60.0, "num_training_images": 118_287} | (summary or {})
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


BINS = {"ece": 0.0, "bin_edges": [0, 1], "bin_confidence": [0.5], "bin_accuracy": [0.5], "bin_count": [2]}


def figures(ap):
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100", "ECE", "ECE_0.1")
    return dict.fromkeys(names, ap) | {"reliability": BINS}


def metrics(ap, coco=False, **others):
    counts = {"num_images": 5000, "num_ground_truths": 36_335, "num_crowds": 446}
    if not coco:
        counts = {"num_images": 87, "num_ground_truths": 1137, "num_crowds": 0}
    return figures(ap) | counts | {"AP_per_class": {"cell": ap}, "deduplication": None} | others


def write_evaluation(folder, path, content, split="val", **about):
    folder.mkdir(exist_ok=True)
    about = {"model": path and str(path), "data": "bccd", "split": split, "top_k": 100, "dtype": None} | about
    (folder / "evaluation.json").write_text(json.dumps(about))
    (folder / "metrics.json").write_text(json.dumps(content))
    return folder


def blocks_of(number, *folders):
    results, strangers = find_results(folders, resolved_recipe)
    assert not strangers
    return measured_blocks(paper_table(number), results)


def test_nothing_measured_is_said_row_by_row():
    for table in TABLES:
        (block,) = measured_blocks(table, [])
        assert [entry.row for entry in block.rows] == list(table.rows)
        assert not any(entry.values or entry.results for entry in block.rows)


def test_runs_on_coco_find_their_rows_and_seeds_are_averaged(tmp_path):
    for seed, ap in enumerate((0.46, 0.47, 0.48)):
        write_run(tmp_path / f"a{seed}", overrides={"seed": seed, "source": "COCO"}, metrics=metrics(ap, coco=True))
    write_run(tmp_path / "nll", overrides={"criterion": "nll", "source": "COCO"}, metrics=metrics(0.35, coco=True))
    (block,) = blocks_of(2, tmp_path)
    assert (block.data, block.split, block.num_images) == ("COCO", "val2017", 5000)
    found = {entry.row.recipe: entry.values.get("AP") for entry in block.rows}
    assert found["drmm_sparse_rcnn_r50.yaml"] == pytest.approx((46.0, 47.0, 48.0))
    assert found["drmm_sparse_rcnn_r50.yaml --criterion nll"] == pytest.approx((35.0,))
    assert [recipe for recipe, values in found.items() if values is None] == [
        "sparse_rcnn_r50.yaml",
        "drmm_sparse_rcnn_r50.yaml --criterion bipartite_nll",
        "drmm_sparse_rcnn_r50.yaml --criterion nll_mcm_bipartite",
    ]


@pytest.mark.parametrize(
    "change", [{"epochs": 12}, {"num_queries": 100, "proposal_grid": [10, 10]}, {"mcm_weight": 1}]
)
def test_another_method_on_coco_is_not_the_papers_row(change, tmp_path):
    write_run(tmp_path / "a", overrides=change | {"source": "COCO"}, metrics=metrics(0.4, coco=True))
    (block,) = blocks_of(2, tmp_path)
    assert not any(entry.values for entry in block.rows)


def test_coco_is_told_by_its_counts_and_not_by_its_name(tmp_path):
    write_run(tmp_path / "a", overrides={"source": "data/COCO"}, metrics=metrics(0.4))
    write_run(
        tmp_path / "b",
        overrides={"source": "data/coco"},
        summary={"num_training_images": 1800},
        metrics=metrics(0.4, coco=True),
    )
    papers, *others = blocks_of(2, tmp_path)
    assert not any(entry.values for entry in papers.rows)
    assert [(block.data, block.split) for block in others] == [("COCO", "val2017"), ("coco", "val2017")]


SMALL = "bccd_lite0_cpu.yaml"


def test_other_data_have_blocks_of_their_own_by_split(tmp_path):
    for criterion, ap in (("nll", 0.3), ("nll_mcm", 0.5)):
        run = write_run(
            tmp_path / criterion, SMALL, {"criterion": criterion, "source": "data/bccd"}, metrics=metrics(ap)
        )
        write_evaluation(run / "test", run / "best", metrics(ap - 0.1), "test")
    papers, val, test = blocks_of(2, tmp_path)
    assert not any(entry.values for entry in papers.rows)
    assert [(block.data, block.split) for block in (val, test)] == [("bccd", "val"), ("bccd", "test")]
    for block, expected in ((val, (30, 50)), (test, (20, 40))):
        by_recipe = {entry.row.recipe: entry.values.get("AP") for entry in block.rows}
        assert len(by_recipe) == 5
        assert by_recipe["drmm_sparse_rcnn_r50.yaml --criterion nll"] == pytest.approx(expected[:1])
        assert by_recipe["drmm_sparse_rcnn_r50.yaml"] == pytest.approx(expected[1:])


def test_runs_of_a_row_that_differ_are_not_averaged_and_say_in_what(tmp_path):
    for index, (criterion, weight) in enumerate((("nll_mcm", 2.0), ("nll_mcm", 2.0), ("nll_mcm", 0.5), ("nll", 2.0))):
        overrides = {"criterion": criterion, "mcm_weight": weight, "seed": index, "source": "bccd"}
        write_run(tmp_path / str(index), SMALL, overrides, metrics=metrics(0.5 + index / 10))
    box = {"head_type": "box", "criterion": "focal_l1_giou", "box_delta_unit": "pixels", "source": "bccd"}
    write_run(tmp_path / "box", SMALL, box, metrics=metrics(0.1))
    _, block = blocks_of(2, tmp_path)
    mine = [entry for entry in block.rows if entry.values]
    assert [entry.values["AP"] for entry in mine] == [
        pytest.approx(values) for values in ((10,), (80,), (50, 60), (70,))
    ]
    assert [entry.differs for entry in mine] == [{}, {}, {}, {"mcm_weight": 0.5}]


def test_backbones_and_epochs_of_other_data_are_not_the_papers(tmp_path):
    write_run(tmp_path / "a", SMALL, {"source": "bccd"}, metrics=metrics(0.5))
    _, block = blocks_of(5, tmp_path)
    assert [entry.row.labels for entry in block.rows] == [
        ("Sparse R-CNN", "", ""),
        ("AdaMixer", "", ""),
        ("D-RMM + Sparse R-CNN", "", ""),
        ("D-RMM + AdaMixer", "", ""),
    ]
    assert [bool(entry.values) for entry in block.rows] == [False, False, True, False]


def entry(ap, iou=None):
    return figures(ap) | {"iou_threshold": iou}


def test_nms_and_winner_take_all_are_those_at_nms_best(tmp_path):
    swept = {"none": entry(0.3), "nms": [entry(0.4, 0.5), entry(0.45, 0.7)], "wta": [entry(0.6, 0.5), entry(0.5, 0.7)]}
    swept["best_iou_threshold"] = 0.7
    overrides = {"criterion": "nll", "source": "bccd"}
    write_run(tmp_path / "nll", SMALL, overrides, metrics=metrics(0.3), duplicates=swept)
    _, block = blocks_of(3, tmp_path)
    assert [entry.values.get("AP") for entry in block.rows[:3]] == [pytest.approx((value,)) for value in (30, 45, 50)]
    assert not block.rows[3].values and not block.rows[4].values


def test_figures_after_nms_are_no_figures_without(tmp_path):
    run = write_run(tmp_path / "nll", SMALL, {"criterion": "nll", "source": "bccd"})
    after = metrics(0.4, deduplication={"method": "nms", "iou_threshold": 0.6})
    write_evaluation(run / "evaluated", run / "best", after)
    _, block = blocks_of(3, tmp_path)
    assert [entry.values.get("AP") for entry in block.rows[:3]] == [None, pytest.approx((40,)), None]


def test_an_evaluation_elsewhere_finds_the_run_of_its_model(tmp_path):
    run = write_run(tmp_path / "runs" / "a", SMALL, {"source": "bccd"}, metrics=metrics(0.5))
    place = write_evaluation(tmp_path / "elsewhere", run / "best", metrics(0.4), "test", data="data/bccd/")
    results, strangers = find_results([tmp_path], resolved_recipe)
    assert {(result.run, result.data, result.split) for result in results} == {
        (run.resolve(), "bccd", "val"),
        (run.resolve(), "bccd", "test"),
    }
    (place / "evaluation.json").unlink()
    results, strangers = find_results([place], resolved_recipe)
    assert not results and strangers == {place.resolve(): "no evaluation.json says what it is of"}
    with pytest.raises(FileNotFoundError, match="does not exist"):
        find_results([tmp_path / "none"], resolved_recipe)


def test_the_newest_of_several_evaluations_stands(tmp_path):
    run = write_run(tmp_path / "a", SMALL, {"source": "bccd"}, metrics=metrics(0.5), cost={"layer_operations": 1})
    for name, age in (("before", 50), ("later", 200), ("middle", 100)):
        place = write_evaluation(tmp_path / name, run / "best", metrics(age / 1000))
        os.utime(place / "metrics.json", (age, age))
    os.utime(run / "metrics.json", (150, 150))
    ((result,), strangers) = find_results([tmp_path], resolved_recipe)
    assert result.files["metrics"]["AP"] == 0.2 and result.places["metrics"] == (tmp_path / "later").resolve()
    older = (run, tmp_path / "before", tmp_path / "middle")
    assert result.superseded.keys() == {one.resolve() / "metrics.json" for one in older}
    assert result.places["cost"] == run.resolve()  # the newest of each file
    (run / "recipe.yaml").write_text("model: {hidden: 3}")
    with pytest.raises(ValueError, match=r"a/recipe.yaml: .*hidden"):
        find_results([tmp_path], resolved_recipe)


def test_results_from_a_file_are_of_no_run_and_calibrated_ones_are_unusual(tmp_path):
    """They lie within the run's folder, and are newer."""
    run = write_run(tmp_path / "a", SMALL, {"source": "bccd"}, metrics=metrics(0.5))
    for name, model, content in (
        ("file", None, metrics(0.1)),
        ("calibrated", run / "best", metrics(0.6, calibration={"scale_factor": 1.1})),
    ):
        write_evaluation(run / name, model, content)
    results, strangers = find_results([tmp_path], resolved_recipe)
    assert strangers == {(run / "file").resolve(): NO_RUN}
    found = {result.options_in_words(): result.files["metrics"]["AP"] for result in results}
    assert found == {"": 0.5, "calibrated True": 0.6}


@pytest.mark.parametrize(
    "options", [{"top_k": 300}, {"dtype": "bfloat16"}, {"model": "last"}, {"annotations": "few.json"}], ids=str
)
def test_an_evaluation_with_other_options_is_no_row(options, tmp_path):
    """It is newer, and lies beside the one that is."""
    run = write_run(tmp_path / "a", SMALL, {"source": "bccd"}, metrics=metrics(0.5))
    for name, fields, ap in (("usual", {"dtype": "float32"}, 0.4), ("other", options, 0.6)):
        fields = fields | {"model": str(run / fields.get("model", "best"))}
        write_evaluation(run / name, None, metrics(ap), **fields)
    results, _ = find_results([tmp_path], resolved_recipe)
    words = {result.options_in_words(): result.files["metrics"]["AP"] for result in results}
    ((name, value),) = options.items()
    assert words == {"": 0.4, f"{'checkpoint' if name == 'model' else name} {value}": 0.6}
    _, block = blocks_of(2, tmp_path)
    assert [value for entry in block.rows for value in entry.values.get("AP", ())] == [40]


def write_weights(run, content):
    (run / "best").mkdir(exist_ok=True)
    (run / "best" / "model.safetensors").write_bytes(content)
    return weights_digest(run / "best")


def test_an_evaluation_at_another_input_size_is_no_result(tmp_path):
    run = write_run(tmp_path / "a", SMALL, {"source": "bccd"}, metrics=metrics(0.5))
    digest = write_weights(run, b"first")
    (run / "best" / "preprocessor_config.json").write_text(json.dumps({"size": 240, "score_threshold": 0.3}))
    same, other, older = (run / name for name in ("same", "other", "older"))
    for place, split, known in ((same, "val", {"size": 240}), (other, "test", {"size": 480}), (older, "train", None)):
        write_evaluation(place, run / "best", metrics(0.4), split, weights=digest, input=known)
    results, strangers = find_results([tmp_path], resolved_recipe)
    assert {result.split for result in results} == {"val", "train"}
    where = run.resolve() / "best"
    assert strangers == {other.resolve(): f"of another input than {where} has now: size 480 instead of 240"}


def test_an_evaluation_of_weights_that_training_has_replaced_is_no_result(tmp_path):
    run = write_run(tmp_path / "a", SMALL, {"source": "bccd"}, metrics=metrics(0.5))
    digest = write_weights(run, b"first")
    place = write_evaluation(run / "test", run / "best", metrics(0.4), "test", weights=digest)
    results, strangers = find_results([tmp_path], resolved_recipe)
    assert {result.split for result in results} == {"val", "test"} and not strangers
    write_weights(run, b"second")
    (result,), strangers = find_results([tmp_path], resolved_recipe)
    assert result.split == "val"
    assert strangers == {place.resolve(): f"of other weights than {run.resolve() / 'best'} has now"}
    shutil.rmtree(run / "best")  # nothing to compare with
    results, strangers = find_results([tmp_path], resolved_recipe)
    assert len(results) == 2 and not strangers


def test_evaluations_follow_a_run_that_moved_and_are_not_of_the_new_one_in_its_place(tmp_path):
    old = write_run(tmp_path / "a", SMALL, {"source": "bccd", "seed": 1}, metrics=metrics(0.5))
    digest = write_weights(old, b"first")
    write_evaluation(old / "test", old / "best", metrics(0.4), "test", weights=digest)
    beside = write_evaluation(tmp_path / "beside", old / "best", metrics(0.4), "test", weights=digest)
    moved = old.rename(tmp_path / "moved")
    write_weights(write_run(old, SMALL, {"source": "bccd", "seed": 2}, metrics=metrics(0.3)), b"second")
    results, strangers = find_results([tmp_path], resolved_recipe)
    assert [result.run for result in results if result.split == "test"] == [moved.resolve()]
    assert [*strangers] == [beside.resolve()]


def test_a_copy_of_a_run_is_no_second_seed(tmp_path):
    for name, content in (("a", b"first"), ("b", b"second")):
        write_weights(write_run(tmp_path / name, SMALL, {"source": "bccd"}, metrics=metrics(0.5)), content)
    shutil.copytree(tmp_path / "a", tmp_path / "copied")
    results, strangers = find_results([tmp_path], resolved_recipe)
    assert [result.run.name for result in results] == ["a", "b"]
    reason = f"the weights are those of {tmp_path.resolve() / 'a'}, a run counts once"
    assert strangers == {(tmp_path / "copied").resolve(): reason}


def test_a_sweep_of_what_nms_left_is_no_sweep(tmp_path):
    swept = {"none": entry(0.3), "nms": [entry(0.4, 0.7)], "wta": [entry(0.6, 0.7)], "best_iou_threshold": 0.7}
    run = write_run(tmp_path / "nll", SMALL, {"criterion": "nll", "source": "bccd"})
    after = metrics(0.4, deduplication={"method": "nms", "iou_threshold": 0.6})
    place = write_evaluation(run / "evaluated", run / "best", after)
    (place / "duplicates.json").write_text(json.dumps(swept))
    (result,), _ = find_results([tmp_path], resolved_recipe)
    assert "nms" in result.files and "duplicates" not in result.files


def test_data_of_one_name_with_other_annotations_have_blocks_of_their_own(tmp_path):
    for name, digest in (("a", "1" * 64), ("b", "2" * 64)):
        run = write_run(tmp_path / name, SMALL, {"source": f"{name}/cells"}, metrics=metrics(0.5))
        write_evaluation(run / "test", run / "best", metrics(0.4), "test", data=f"{name}/cells", ground_truth=digest)
    _, val, *tests = blocks_of(2, tmp_path)
    assert (val.data, val.ground_truth) == ("cells", "")
    assert [(block.data, block.split, block.ground_truth) for block in tests] == [
        ("cells", "test", "1" * 8),
        ("cells", "test", "2" * 8),
    ]


@pytest.mark.parametrize("content", ["[]", "{}", "null", '{"model": 3, "split": "val", "top_k": 100}'])
def test_a_damaged_evaluation_is_no_usual_one(content, tmp_path):
    run = write_run(tmp_path / "a", SMALL, {"source": "bccd"}, metrics=metrics(0.5))
    place = write_evaluation(run / "test", run / "best", metrics(0.4), "test")
    (place / "evaluation.json").write_text(content)
    with pytest.raises(ValueError, match="evaluation.json"):
        find_results([tmp_path], resolved_recipe)


def test_likelihoods_by_stage_and_their_ratios(tmp_path):
    for criterion, nll in (("nll_mcm", [12.0, 10.0, 9.0, 8.0]), ("nll", [11.0, 9.0, 9.0, 6.0])):
        group = {"nll": nll, "share": [value / 16 for value in nll]}
        overrides = {"criterion": criterion, "source": "bccd"}
        write_run(tmp_path / criterion, SMALL, overrides, metrics=metrics(0.3), likelihood={"all": group})
    _, four = blocks_of(4, tmp_path)
    assert [entry.values["NLL"] for entry in four.rows] == [(6.0,), (8.0,)]
    _, nine = blocks_of(9, tmp_path)
    assert [entry.row.labels for entry in nine.rows] == [
        (str(stage), name) for stage in range(1, 5) for name in ("w/ MCM", "w/o MCM")
    ]
    assert nine.rows[1].values["NLL ratio"] == nine.rows[1].values["exp(-MCM) ratio"] == pytest.approx((11 / 12,))
    assert "NLL ratio" not in nine.rows[0].values


def test_weights_and_numbers_of_queries_that_the_paper_did_not_try(tmp_path):
    for index, (weight, queries) in enumerate(((2, 100), (0.5, 100), (0.5, 25))):
        grid = {100: [10, 10], 25: [5, 5]}[queries]
        overrides = {"mcm_weight": weight, "num_queries": queries, "proposal_grid": grid, "source": "bccd"}
        write_run(tmp_path / str(index), SMALL, overrides, metrics=metrics(index / 10))
    _, block = blocks_of(8, tmp_path)
    found = {entry.row.labels: entry.values["AP"] for entry in block.rows}
    assert found == {("2", "100"): (0,), ("0.5", "100"): (10,), ("0.5", "25"): (20,)}


def test_costs_need_no_training_and_the_papers_size(tmp_path):
    cost = {"trainable_parameters": 106_125_254, "layer_operations": 165_469_363_200, "num_labels": 80}
    for name, size in (("a", [800, 1280]), ("b", [320, 320])):
        (tmp_path / name).mkdir()
        load_recipe(RECIPES / "drmm_sparse_rcnn_r50.yaml").save(tmp_path / name / "recipe.yaml")
        (tmp_path / name / "cost.json").write_text(json.dumps(cost | {"size": size}))
    (block,) = blocks_of(11, tmp_path)
    (mine,) = (entry for entry in block.rows if entry.values)
    assert mine.row.labels == ("Sparse R-CNN", "w/ ours")
    assert mine.values["FLOPs (G)"] == pytest.approx((165.469,), abs=1e-3) and "memory (GB)" not in mine.values


@given(st.lists(st.floats(0, 100), min_size=2, max_size=9))
def test_the_spread_is_the_standard_error(values):
    middle, error = spread(values)
    assert middle == pytest.approx(sum(values) / len(values))
    variance = sum((value - middle) ** 2 for value in values) / (len(values) - 1)
    assert error == pytest.approx((variance / len(values)) ** 0.5, abs=1e-9)
    assert spread(values[:1]) == (values[0], None)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metrics", '{"AP": 0.5, "num_ima', "metrics.json is not valid json"),
        ("metrics", json.dumps(metrics("high")), "metrics.json: AP, AP50, .* missing or out of range"),
        ("metrics", json.dumps(metrics(0.5) | {"AP": 56.2}), "metrics.json: AP missing or out of range"),
        ("metrics", json.dumps(metrics(0.5) | {"ECE": float("nan")}), "metrics.json: ECE missing or out of range"),
        ("metrics", json.dumps({"AP": 0.5, "AP_per_class": {}}), "metrics.json: reliability missing"),
        ("summary", '{"steps": "many", "training_seconds": 1}', "summary.json: steps missing or out of range"),
        ("duplicates", '{"nms": []}', "duplicates.json: none missing"),
    ],
)
def test_a_damaged_result_is_named(name, text, message, tmp_path):
    folder = write_run(tmp_path / "run", metrics=metrics(0.5))
    (folder / f"{name}.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        blocks_of(3, folder)
