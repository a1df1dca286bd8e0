import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from conftest import tiny_config
from drmm_hf import DrmmConfig, DrmmImageProcessor
from drmm_hf.conversion.class_names import class_fields
from drmm_hf.hub.card import CITATION, INDEXED, Subject, card_data, check_card, is_untouched, write_card
from drmm_hf.hub.results import Evaluation, find_evaluations, find_training
from trained_run import DETECTOR, NAMES, make_evaluation, make_run


def test_the_paper_is_cited_as_in_the_readme():
    assert CITATION in (Path(__file__).parents[2] / "README.md").read_text()


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    best = make_run(tmp_path_factory.mktemp("card") / "cells")
    make_evaluation(best.parent, best, split=None)
    make_evaluation(best.parent / "test", best)
    config = DrmmConfig.from_pretrained(best)
    evaluations, _ = find_evaluations(best, config)
    processor = DrmmImageProcessor.from_pretrained(best)
    needs = {"torch": ">=2.9,<3"}
    return Subject("me/cells", config, processor, 12345, needs, evaluations, find_training(best), None, "mit")


def test_the_header_holds_the_figures_as_they_are(subject):
    text = write_card(subject)
    card = ModelCard(text)
    assert (card.data.license, card.data.pipeline_tag, card.data.library_name) == (
        "mit",
        "object-detection",
        "transformers",
    )
    read = {(one.dataset_name, one.dataset_split, one.metric_name): one.metric_value for one in card.data.eval_results}
    assert read == {(one.data, one.split, name): one.metrics[name] for one in subject.evaluations for name in INDEXED}
    assert len(read) == 10
    # Not by way of huggingface_hub: what is written is the model-index of the Hub's specification.
    header = yaml.safe_load(text.split("---\n")[1])
    (index,) = header["model-index"]
    assert index["name"] == "cells" and index["results"][0]["task"]["type"] == "object-detection"
    # A bare name would be that of a data set on the Hub, which these are not.
    assert index["results"][0]["dataset"] == {"name": "cells", "type": "local", "split": "test"}
    on_hub = replace(subject, evaluations=[replace(subject.evaluations[0], data="me/cells")])
    assert card_data(on_hub)["eval_results"][0].dataset_type == "me/cells"
    assert index["results"][0]["metrics"][0] == {"type": "AP", "value": read["cells", "test", "AP"], "name": "AP"}
    assert check_card(text, card_data(subject).get("eval_results")) == []


def test_every_figure_of_the_text_is_in_a_file(subject):
    """Take the figures away one file after the other: what remains knows none of them."""
    text = write_card(subject)
    per_cent = f"{100 * subject.evaluations[0].metrics['AP']:.2f}"
    assert (
        f"| [cells, test](results/cells_test/metrics.json) | 1 | {per_cent} |" in text
        and "chose the checkpoint" in text
    )
    assert "No file was found of: intervals of the calibration error" in text
    without = write_card(replace(subject, evaluations=(), training=None))
    assert "No result file was found" in without and "No record of the training" in without
    assert "model-index" not in without and "ECE" not in without
    body = re.sub(r"```.*?```", "", without.split("---\n", 2)[2], flags=re.DOTALL)
    numbers = {float(number) for number in re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])", body)}
    assert numbers <= {2.0, 0.5}, numbers  # of Apache-2.0 and of transformers' pipeline


def test_every_number_of_the_result_table_is_of_its_file(subject):
    rows = [line for line in write_card(subject).splitlines() if re.match(r"\| \[cells, (test|val)\]", line)]
    for row, one in zip(rows, subject.evaluations, strict=True):
        cells = [cell.strip() for cell in row.strip("|").split("|")][2:]
        names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "ECE", "ECE_0.1")
        assert cells == ["-" if one.metrics[name] is None else f"{100 * one.metrics[name]:.2f}" for name in names]
    assert "-" in cells  # no small objects


def test_where_the_calibration_was_fitted_is_said(subject):
    test, _ = subject.evaluations
    assert "calibration was fitted" not in write_card(subject)
    mine, others = (
        {"scale_factor": 2.0, "fitted_on": {"num_images": 87, "pictures": pictures}}
        for pictures in (test.about["ground_truth"], "0" * 64)
    )
    for calibration, said, marked in (
        (others, "fitted on 87 pictures of another split than the figures", False),
        (mine, "fitted on the pictures of cells, test", True),
        ({"scale_factor": 2.0}, "fitted on pictures that no file names", False),
    ):
        reports = {"metrics": test.metrics | {"calibration": calibration}}
        processor = DrmmImageProcessor(calibration=calibration)
        text = write_card(replace(subject, processor=processor, evaluations=[replace(test, reports=reports)]))
        assert said in text and ("| [cells, test](results/cells_test/metrics.json) (2) |" in text) == marked
        assert "Figures were measured on cells (test) only" in text


def test_thresholds_and_precision_are_said_in_words(subject):
    assert "| mixed precision | none: float32 throughout |" in write_card(subject)
    for saved, said in (
        (None, "0.5, the processor's default"),
        ([0.2] * 3, "the one of each class that `drmm calibrate`"),
    ):
        text = write_card(replace(subject, processor=DrmmImageProcessor(score_threshold=saved)))
        assert f"`threshold=None` is {said}" in text and "trust_remote_code=True, threshold=None)" in text


def test_undefined_figures_are_not_indexed(subject):
    metrics = subject.evaluations[0].metrics | {"AP75": None}
    one = replace(subject.evaluations[0], reports={"metrics": metrics})
    text = write_card(replace(subject, evaluations=[one]))
    assert "AP75" not in {result.metric_name for result in ModelCard(text).data.eval_results}
    assert check_card(text) == []


def test_reports_beyond_the_metrics_are_shown(subject):
    reports = {
        "calibration": {
            "kinds": {
                "confidence": {
                    "ECE": 0.0123,
                    "ECE_interval": [0.01, 0.02],
                    "ECE_0.1": 0.045,
                    "ECE_0.1_interval": [0.03, None],
                }
            }
        },
        "likelihood": {"all": {"nll": [14.5, 13.671]}},
        "coverage": {"levels": [0.85, 0.9000000001], "predicted": {"all": [0.9, 0.9957]}},
    }
    one = replace(subject.evaluations[0], reports=subject.evaluations[0].reports | reports)
    text = write_card(replace(subject, evaluations=[one]))
    for said in ("ECE 1.23 (95 % interval 1.00 to 2.00)", "ECE_0.1 4.50", "annotation 13.671", "hold 99.57 %"):
        assert said in text
    assert "No file was found" not in text and f"]({one.place}/likelihood.json)" in text


def test_hostile_names_break_neither_header_nor_table(subject):
    names = {0: "a|b", 1: "x\n---\nlicense: none", 2: "<script>"}
    config = DrmmConfig(**(subject.config.to_dict() | {"id2label": names, "label2id": None}))
    metrics = subject.evaluations[0].metrics | {"AP_per_class": {name: 0.5 for name in names.values()}}
    one = replace(subject.evaluations[0], data="a: |b", reports={"metrics": metrics})
    text = write_card(replace(subject, config=config, evaluations=[one]))
    assert ModelCard(text).data.license == "mit" and "<script>" not in text
    assert "| a\\|b | 50.00 |" in text and "| x --- license: none | 50.00 |" in text
    assert "a\\|b" in write_card(subject) and NAMES[1] in write_card(subject)


def test_data_of_the_hub_are_linked(subject):
    one = replace(subject.evaluations[0], data="owner/cells")
    assert ModelCard(write_card(replace(subject, evaluations=[one]))).data.datasets == ["owner/cells"]
    assert ModelCard(write_card(subject)).data.datasets is None


def test_a_converted_model_says_where_it_comes_from():
    config = tiny_config(**class_fields("coco", 80))
    about = {"source": "r50.pth", "sha256": "a1b2", "family": "mmdetection"}
    subject = Subject("me/r50", config, DrmmImageProcessor(), 1, {}, conversion=about)
    text = write_card(subject)
    assert "`r50.pth` (sha256 `a1b2`)" in text and "The paper states no figure" in text
    assert "No licence of the weights was stated" in text and "license:" not in text.split("---\n")[1]


@pytest.mark.parametrize("decoder", ["sparse_rcnn", "adamixer"])
@pytest.mark.parametrize("head", ["mixture", "box"])
def test_every_detector_has_a_card(decoder, head):
    criterion = {"criterion": "focal_l1_giou"} if head == "box" else {}
    config = tiny_config(**DETECTOR[decoder], head_type=head, **criterion)
    text = write_card(Subject("cells", config, DrmmImageProcessor(), 1, {}))
    assert ("mixture density" in text) == (head == "mixture")


@given(st.sampled_from(["\r\n", "\n"]), st.integers(0, 10**6), st.sampled_from(["x", " ", "0", "\n"]))
def test_an_edited_card_is_told_from_one_that_is_not(subject, ending, place, added):
    text = write_card(subject)
    assert is_untouched(text.replace("\n", ending))
    place %= text.index("\n<!-- drmm push")
    assert not is_untouched(text[:place] + added + text[place:])
    assert not is_untouched(text[: text.index("\n<!--")]) and not is_untouched("")


@pytest.mark.parametrize(
    "header",
    ["model-index:\n- name: x\n  results:\n  - task: {}", "license: [", "model-index: 3", "- a\n- b"],
)
def test_headers_that_the_hub_would_not_take_are_refused(header):
    with pytest.raises(ValueError, match="header of README.md"):
        check_card(f"---\n{header}\n---\n\n# x\n")


def test_a_card_with_other_figures_is_noticed(subject):
    expected = card_data(subject)["eval_results"]
    text = write_card(subject).replace(json.dumps(expected[0].metric_value), "0.99")
    assert any("model-index" in note for note in check_card(text, expected))
    assert len(check_card("# mine\n", expected)) == 3


def test_evaluations_of_one_name_go_to_one_place():
    assert Evaluation("x", "owner/my cells", "test[:9%]", False, {}, {}).place == "results/owner_my_cells_test_9_"


def test_splits_that_chose_the_checkpoint_are_shown_where_there_is_no_other(subject):
    test, own = subject.evaluations
    assert subject.shown == [test] and replace(subject, evaluations=[own]).shown == [own]
    assert "### cells, val" not in write_card(subject)
    assert "### cells, val" in write_card(replace(subject, evaluations=[own]))


def test_spoilt_reports_are_refused(subject):
    for reports in ({"calibration": {}}, {"likelihood": {"all": {"nll": []}}}, {"coverage": {"levels": [0.9]}}):
        one = replace(subject.evaluations[0], reports=subject.evaluations[0].reports | reports)
        with pytest.raises(ValueError, match="is not as `drmm evaluate` writes it"):
            write_card(replace(subject, evaluations=[one]))


def test_a_box_head_is_not_asked_for_its_density(subject):
    config = tiny_config(head_type="box", criterion="focal_l1_giou")
    text = write_card(replace(subject, config=config))
    assert "--calibration" in text and "--losses" not in text and "--coverage" not in text
