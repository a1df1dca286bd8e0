from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drmm_hf.data.labels import LabelMap


records = st.lists(
    st.fixed_dictionaries({"id": st.integers(-(2**40), 2**40), "name": st.text(max_size=8)}),
    min_size=1,
    max_size=30,
    unique_by=(lambda record: record["id"], lambda record: record["name"]),
)


@given(records)
def test_round_trip_of_any_ids_in_file_order(categories):
    label_map = LabelMap.from_categories(categories)
    assert len(label_map) == len(categories)
    for label, record in enumerate(categories):
        assert label_map.label(record["id"]) == label
        assert label_map.category_id(label) == record["id"]
        assert label_map.id2label[label] == record["name"]
        assert label_map.label2id[record["name"]] == label
    config = SimpleNamespace(
        id2label={str(k): v for k, v in label_map.id2label.items()}, category_ids=list(label_map.category_ids)
    )
    assert LabelMap.from_config(config) == label_map


def test_config_without_category_ids_counts_from_zero():
    label_map = LabelMap.from_config(SimpleNamespace(id2label={1: "b", 0: "a"}, category_ids=None))
    assert label_map == LabelMap((0, 1), ("a", "b"))
    assert LabelMap.from_config(SimpleNamespace(id2label={0: "a"})) == LabelMap((0,), ("a",))
    with pytest.raises(ValueError, match=r"id2label has the labels \[1, 2\]"):
        LabelMap.from_config(SimpleNamespace(id2label={1: "a", 2: "b"}))


def test_real_config_keeps_the_map():
    from drmm_hf.modeling.configuration_drmm import DrmmConfig

    label_map = LabelMap((90, 4, 17), ("crab", "newt", "owl"))
    config = DrmmConfig(id2label=label_map.id2label, category_ids=list(label_map.category_ids))
    assert LabelMap.from_config(config) == label_map


def test_unknown_id_and_label_are_named():
    label_map = LabelMap((90, 4), ("crab", "newt"))
    with pytest.raises(ValueError, match=r"category id 5 .*\[90, 4\]"):
        label_map.label(5)
    for label in (-1, 2):
        with pytest.raises(ValueError, match=f"label {label} is out of range"):
            label_map.category_id(label)


@pytest.mark.parametrize(
    ("ids", "names", "message"),
    [
        ((1, 1), ("a", "b"), "category_ids holds 1 more than once"),
        ((1, 2), ("a", "a"), "names holds 'a' more than once"),
        ((1,), ("a", "b"), "differ in length"),
        ((), (), "at least one class"),
    ],
)
def test_a_map_that_cannot_be_inverted_is_refused(ids, names, message):
    with pytest.raises(ValueError, match=message):
        LabelMap(ids, names)


def test_printed_table():
    lines = str(LabelMap((90, 4), ("crab", "newt"))).splitlines()
    assert [line.split() for line in lines] == [
        ["label", "category", "id", "name"],
        ["0", "90", "crab"],
        ["1", "4", "newt"],
    ]
