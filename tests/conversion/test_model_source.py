"""Folders that exist are found; of other names it is decided without the Hub whether they could be ids there."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drmm_hf.conversion.model_source import find_source


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Work beside `runs/best/` and `weights.pth`, at home."""
    (tmp_path / "runs" / "best").mkdir(parents=True)
    for folder in ("runs", "runs/best"):
        (tmp_path / folder / "config.json").write_text("{}")
    (tmp_path / "weights.pth").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.parametrize("name", ["runs", "runs/best", "./runs/best", "runs/best/", "../{here}/runs", "~/runs/best"])
def test_folders_that_exist_are_meant(name, tmp_path):
    found = find_source(name.format(here=tmp_path.name))
    assert Path(found).is_dir() and Path(found) == Path(name.format(here=tmp_path.name).replace("~", str(tmp_path)))


@pytest.mark.parametrize(
    "name",
    ["facebook/detr-resnet-50", "timm/resnet50.a1_in1k", "tf_efficientnet_lite0", "best", "o/name.v1.0", "owner/run"],
)
def test_ids_are_left_to_the_hub(name):
    assert find_source(name) == name


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("runs/bset", "but 'runs' does, and so the Hub was not asked"),
        ("runs/a/best", "no id on the Hub looks like this"),
        ("./best", "no id on the Hub looks like this"),
        ("../best", "no id on the Hub looks like this"),
        ("/best", "no id on the Hub looks like this"),
        ("~/best", "no id on the Hub looks like this"),
        ("~nobody-of-this-name/best", "no id on the Hub looks like this"),
        ("a folder", "no id on the Hub looks like this"),
        ("runs\\best", "no id on the Hub looks like this"),
        ("nul\0l", "no id on the Hub looks like this"),
        ("", "no id on the Hub looks like this"),
        ("owner/best.safetensors", "no id on the Hub ends like a file"),
        ("model.PTH", "no id on the Hub ends like a file"),
    ],
)
def test_paths_that_do_not_exist_fail_at_once_and_say_why(name, reason):
    with pytest.raises(FileNotFoundError) as error:
        find_source(name, "init_from")
    assert str(error.value).startswith(f"init_from {name!r} does not exist, ")
    assert reason in str(error.value)


def test_the_folder_of_a_run_is_no_model_but_holds_some(tmp_path):
    (tmp_path / "runs" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="model 'runs' holds no config.json, .*; is it 'runs/best'\\?$"):
        find_source("runs")
    (tmp_path / "runs" / "best" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="model 'runs' holds no config.json, as a folder of a model does.$"):
        find_source("runs")


def test_a_file_is_no_model():
    with pytest.raises(NotADirectoryError, match="model 'weights.pth' is a file; give the folder"):
        find_source("weights.pth")


@given(st.text(max_size=30))
def test_any_text_is_an_id_or_a_sentence(name):
    try:
        assert Path(find_source(name)).is_dir() or find_source(name) == name and name.count("/") <= 1
    except (FileNotFoundError, NotADirectoryError) as error:
        assert repr(name) in str(error)


@pytest.mark.parametrize("content", ["null", "3", "[]"])
def test_a_config_that_is_no_object_is_named(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=f"config.json holds {re.escape(content)}; the rule is an object"):
        find_source(tmp_path)
