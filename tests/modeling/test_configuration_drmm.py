"""The configuration refuses what it does not understand, in words, and survives its json."""

import json
import math

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, ResNetConfig, SwinConfig

from conftest import STAGES, tiny_config
from drmm_hf import DrmmConfig
from drmm_hf.modeling.configuration_drmm import logger


NUMBERS = {
    "attention_dropout",
    "dropout",
    "proposal_size",
    "roi_level_base",
    "box_delta_factor",
    "box_scale_factor",
    "top_k_ratio",
    "mcm_weight",
    "min_scale_ratio",
    "likelihood_epsilon",
    "student_t_freedom",
    "class_exponent",
    "loss_weight",
}


def test_defaults_are_the_papers_300_query_detector():
    config = DrmmConfig()
    expected = {
        "decoder_type": "sparse_rcnn",
        "neck_type": "fpn",
        "head_type": "mixture",
        "criterion": "nll_mcm",
        "num_queries": 300,
        "num_stages": 6,
        "hidden_size": 256,
        "num_labels": 80,
        "proposal_grid": [15, 20],
        "mcm_weight": 0.5,
        "mcm_stop_gradient": ["F"],
        "coordinate_distribution": "cauchy",
        "box_delta_unit": "pixels",
        "loss_weight": 1.0,
    }
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.model_type == "drmm" and isinstance(config.backbone_config, ResNetConfig)
    assert config.backbone_config.out_features == STAGES


def test_fields_that_replace_stored_ones_are_checked_with_them():
    stored = tiny_config(hidden_size=32).to_dict()
    config = DrmmConfig.from_dict(stored, decoder_type="adamixer")
    assert (config.neck_type, config.num_box_layers, config.overlap_attention) == ("channel_mapping", 1, True)
    back = DrmmConfig.from_dict(config.to_dict(), decoder_type="sparse_rcnn", num_box_layers=2)
    assert (back.neck_type, back.num_box_layers, back.overlap_attention) == ("fpn", 2, False)
    assert DrmmConfig.from_dict(stored, head_type="box").criterion == "focal_l1_giou"
    assert DrmmConfig.from_dict(stored, decoder_type="sparse_rcnn").to_dict() == DrmmConfig.from_dict(stored).to_dict()
    assert DrmmConfig.from_dict(stored, top_k_ratio=0.5).top_k_ratio == 0.5
    for wrong in ({"top_k_ratio": 5.0}, {"num_ground_truth_copies": 3}, {"mcm_stop_gradient": ["Q"]}):
        with pytest.raises(StrictDataclassError, match=next(iter(wrong))):
            DrmmConfig.from_dict(stored, **wrong)


@pytest.mark.parametrize("wrong", [{"mcm_weight": math.inf}, {"likelihood_epsilon": 1e-44}, {"bbox_cost": math.nan}])
def test_numbers_that_cannot_be_computed_with_are_refused(wrong):
    with pytest.raises(StrictDataclassError, match=next(iter(wrong))):
        tiny_config(**wrong)


@pytest.mark.parametrize("name", sorted(NUMBERS))
def test_numeric_fields_take_ints_and_floats(name):
    value = 0 if "dropout" in name else 1
    assert getattr(tiny_config(**{name: value}), name) == value
    assert getattr(tiny_config(**{name: 0.5}), name) == 0.5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_queries": "12"}, "num_queries='12' must be int"),
        ({"num_queries": 12.0}, "num_queries=12.0 must be int"),
        ({"hidden_size": True}, "hidden_size=True must be int"),
        ({"mcm_weight": "0.5"}, "mcm_weight='0.5' must be float or int"),
        ({"mcm_stop_gradient": "F"}, r"mcm_stop_gradient='F' must be list\[str\] or tuple\[str, ...\]"),
        ({"proposal_grid": [3, "4"]}, r"proposal_grid=\[3, '4'\] must be list\[int\] or tuple\[int, ...\] or None"),
        ({"top_k_last_stage": "yes"}, "top_k_last_stage='yes' must be bool"),
        ({"criterion": "focal"}, "criterion='focal' must be one of 'nll_mcm', 'nll', .*'focal_l1_giou' or None"),
        ({"box_delta_unit": "metres"}, "box_delta_unit='metres' must be one of '"),
        ({"backbone_norm": "sync"}, "backbone_norm='sync' must be one of '"),
        ({"coordinate_distribution": "laplace"}, "coordinate_distribution='laplace' must be one of '"),
        ({"num_labels": 0}, "num_labels=0 must be at least 1"),
        ({"num_stages": 0}, "num_stages=0 must be at least 1"),
        ({"hidden_size": 15}, "hidden_size=15 must be divisible by num_attention_heads=2"),
        ({"proposal_size": 0}, "proposal_size=0 must be positive"),
        ({"student_t_freedom": -1.0}, "student_t_freedom=-1.0 must be positive"),
        ({"mcm_weight": -0.1}, "mcm_weight=-0.1 must not be negative"),
        ({"likelihood_epsilon": math.nan}, "likelihood_epsilon=nan must be finite"),
        ({"dropout": 1}, r"dropout=1 must lie in \[0, 1\)"),
        ({"freeze_backbone_stages": 5}, "freeze_backbone_stages=5 must be 0..4"),
        ({"proposal_grid": [3, 5]}, r"proposal_grid=\[3, 5\] must be .* product is num_queries=12"),
        ({"proposal_grid": [12]}, r"proposal_grid=\[12\] must be \[rows, columns\]"),
        ({"proposal_grid": [-3, -4]}, r"proposal_grid=\[-3, -4\] must be"),
        ({"top_k_ratio": 0}, r"top_k_ratio=0 must lie in \(0, 1\]"),
        ({"top_k_ratio": 1.5}, r"top_k_ratio=1.5 must lie in \(0, 1\]"),
        ({"top_k_ratio": 0.1}, "top_k_ratio=0.1 must leave at least one query"),
        ({"mcm_stop_gradient": ["pi", "G"]}, r"mcm_stop_gradient=\['pi', 'G'\] must hold only"),
        ({"category_ids": [1, 2]}, r"category_ids=\[1, 2\] must hold one distinct id for each of the 3 labels"),
        ({"category_ids": [1, 2, 2]}, r"category_ids=\[1, 2, 2\] must hold one distinct id"),
    ],
    ids=str,
)
def test_wrong_values_are_refused_in_words(fields, message):
    with pytest.raises(StrictDataclassError, match=f"^{message}[^\n]*\\.$"):
        tiny_config(**fields)


def test_fields_set_or_stored_later_are_refused_in_the_same_words(tmp_path):
    config = tiny_config()
    with pytest.raises(StrictDataclassError, match=r"^num_stages='2' must be int\.$"):
        config.num_stages = "2"
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    for wrong, words in (({"num_stages": 2.5}, "2.5 must be int"), ({"num_stages": -1}, "-1 must be at least 1")):
        (tmp_path / "config.json").write_text(json.dumps(stored | wrong))
        with pytest.raises(StrictDataclassError, match=rf"^num_stages={words}\.$"):
            DrmmConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "nearest"), [("num_querys", "num_queries"), ("mcm_wieght", "mcm_weight"), ("num_classes", "num_labels")]
)
def test_an_unknown_field_names_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=f"{name}=3 is not a field of DrmmConfig; the nearest is .*{nearest[:4]}"):
        tiny_config(**{name: 3})
    if name != "num_classes":
        with pytest.raises(ValueError, match=f"nearest is '{nearest}'"):
            tiny_config(**{name: 3})


def test_what_was_set_on_a_config_does_not_keep_its_checkpoint_from_loading(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(logger, "warning", said.append)
    config = tiny_config()
    config.batch_norm_eps = 1.0
    config.save_pretrained(tmp_path)
    for load in (DrmmConfig.from_pretrained, AutoConfig.from_pretrained):
        loaded = load(tmp_path)
        assert loaded.batch_norm_eps == 1.0 and loaded.num_queries == config.num_queries
    assert said == ["batch_norm_eps=1.0 in the stored config is not a field of DrmmConfig: not used."] * 2


def test_a_misspelt_field_is_refused_in_a_stored_config_too(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stored | {"mcm_wieght": 0.3}))
    with pytest.raises(ValueError, match="mcm_wieght=0.3 is not a field of DrmmConfig; the nearest is 'mcm_weight'"):
        DrmmConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("backbone", [{}, {"model_type": "resnt"}, {"depths": [1, 1, 1, 1]}, {"model_type": None}])
def test_the_kind_of_a_backbone_is_known(backbone):
    with pytest.raises(ValueError, match=r'^backbone_config={.*} must have a "model_type" .* such as "resnet"\.$'):
        tiny_config(backbone_config=backbone)


@pytest.mark.parametrize("names", [["cat", "dog"], 2])
def test_names_of_classes_are_a_dict(names):
    with pytest.raises(ValueError, match=r"^id2label=.* must be a dict of names by label\.$"):
        tiny_config(id2label=names)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"proposal_grid": None},
        {"proposal_grid": (4, 3), "mcm_stop_gradient": ("pi", "P")},
        {"mcm_stop_gradient": []},
        {"top_k_ratio": 0.7, "top_k_last_stage": False},
        {"id2label": {0: "cat", 1: "dog"}, "category_ids": [17, 18]},
        {"box_delta_unit": "box", "likelihood_epsilon": 0, "loss_weight": 2, "backbone_norm": "frozen"},
        {"backbone_config": SwinConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], out_features=STAGES)},
        {"backbone_config": {"model_type": "timm_backbone", "backbone": "resnet18", "out_indices": [1, 2, 3, 4]}},
    ],
    ids=lambda fields: "-".join(fields) or "defaults",
)
def test_json_round_trip(fields, tmp_path):
    config = tiny_config(**fields)
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_type"] == "drmm"
    for again in (DrmmConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        again.name_or_path = config.name_or_path
        assert type(again) is DrmmConfig and again.to_dict() == config.to_dict()
        assert type(again.backbone_config) is type(config.backbone_config)
        assert again.proposal_grid == (list(fields.get("proposal_grid", (3, 4)) or ()) or None)


class TestNewLabels:
    @pytest.fixture
    def folder(self, tmp_path):
        names = {index: f"thing {index}" for index in range(80)}
        tiny_config(id2label=names, category_ids=list(range(1, 81)), mcm_weight=0.4).save_pretrained(tmp_path)
        return tmp_path

    def test_replace_all_that_was_stored_about_the_old_ones(self, folder):
        config = DrmmConfig.from_pretrained(folder, num_labels=3)
        assert (config.num_labels, len(config.id2label), config.category_ids) == (3, 3, None)
        config = DrmmConfig.from_pretrained(folder, id2label={0: "a", 1: "b"}, category_ids=[5, 9])
        assert (config.num_labels, config.id2label, config.category_ids) == (2, {0: "a", 1: "b"}, [5, 9])
        assert DrmmConfig.from_pretrained(folder, id2label={0: "a", 1: "b"}).category_ids is None
        assert config.mcm_weight == 0.4

    def test_are_not_assumed_without_being_given(self, folder):
        for fields in ({}, {"num_labels": 80}, {"mcm_weight": 0.1}):
            config = DrmmConfig.from_pretrained(folder, **fields)
            assert config.id2label[79] == "thing 79" and config.category_ids[0] == 1


@pytest.mark.parametrize(
    ("ratio", "last", "expected"),
    [(None, True, [300] * 6), (0.8, True, [240, 192, 153, 122, 97, 77]), (0.8, False, [240, 192, 153, 122, 97, 97])],
)
def test_queries_per_stage(ratio, last, expected):
    assert DrmmConfig(top_k_ratio=ratio, top_k_last_stage=last).queries_per_stage == expected


def test_every_field_is_documented():
    own = [name for name in DrmmConfig.__annotations__ if name not in ("backbone_config",)]
    undocumented = [name for name in own if f"{name} (`" not in DrmmConfig.__doc__]
    assert len(own) > 30 and not undocumented


@pytest.mark.parametrize(("last_stage", "left"), [(False, 336), (True, 235)], ids=["paper", "public code"])
def test_2000_queries_at_ratio_0_7_end_as_the_paper_and_the_public_code_count_them(last_stage, left):
    config = DrmmConfig(num_queries=2000, proposal_grid=[40, 50], top_k_ratio=0.7, top_k_last_stage=last_stage)
    assert config.queries_per_stage == [1400, 980, 686, 480, 336, left]
