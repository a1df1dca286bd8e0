"""Files are read by their first bytes; what holds no tensors is named in one line, in no library's words."""

import gzip
import io
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from drmm_hf.conversion.tensor_file import read_tensor_file


WEIGHTS = {"conv.weight": torch.arange(12.0).reshape(3, 4), "conv.bias": torch.zeros(3)}


def saved(content, **options) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def zipped(**entries: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in entries.items():
            archive.writestr(f"archive/{name.replace('_', '.')}", text)
    return file.getvalue()


FORMS = {
    "safetensors": save(WEIGHTS),
    "zip": saved(WEIGHTS),
    "old": saved(WEIGHTS, _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors", "model", "mödel ü 模型.bin"])
@pytest.mark.parametrize("form", FORMS)
def test_the_form_is_read_from_the_bytes_whatever_the_name(form, name, tmp_path):
    (tmp_path / name).write_bytes(FORMS[form])
    found = read_tensor_file(tmp_path / name)
    assert found.keys() == WEIGHTS.keys() and all(torch.equal(found[key], WEIGHTS[key]) for key in WEIGHTS)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", r"empty \(0 bytes\)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 123\n", "a git-LFS pointer .*git lfs pull"),
        (b"\n<!DOCTYPE HTML>\n<title>404</title>", "a web page: the download failed"),
        (b"<html><body>rate limited", "a web page: the download failed"),
        (b"<?xml version='1.0'?><Error/>", "an XML text: the download failed"),
        (gzip.compress(FORMS["zip"]), "an archive .gzip.: unpack it first"),
        (b"some notes\n", "neither .* it has 11 bytes and begins with b'some notes"),
        (b"\xff" * 8 + b"{}", "neither a file of torch.save nor of safetensors"),
        (FORMS["safetensors"][:5], "neither a file of torch.save nor of safetensors: it has 5 bytes"),
        (pickle.dumps({"model": 3}), "a pickle that torch.save did not write"),
        (
            FORMS["safetensors"][:-7],
            f"cut short, {len(FORMS['safetensors']) - 7} of ",
        ),
        (FORMS["safetensors"][:30], "cut short, 30 of "),
        (FORMS["zip"][:-30], f"cut short or damaged: {len(FORMS['zip']) - 30} bytes of a torch.save archive without"),
        (FORMS["old"][:-20], "cannot be read; is it damaged or cut short"),
        (zipped(readme_txt="hello"), "a zip archive that torch.save did not write: it holds archive/readme.txt"),
        (zipped(data_pkl="x", constants_pkl="x"), "a TorchScript program"),
        (zipped(data_pkl="x"), "cannot be read; is it damaged"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("name", ["wrong.pth", "wrong.safetensors"])
@pytest.mark.parametrize("trust", [False, True])
def test_what_is_no_file_of_tensors_is_named_in_one_line(content, words, name, trust, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.*{words}") as error:
        read_tensor_file(tmp_path / name, trust)
    assert "\n" not in str(error.value) and "weights_only" not in str(error.value)


def test_folders_and_absent_files_are_told_apart(tmp_path):
    with pytest.raises(FileNotFoundError, match="is a folder; it must be a file"):
        read_tensor_file(tmp_path)
    (tmp_path / "link.pth").symlink_to(tmp_path / "gone.pth")
    for name in ("nowhere.pth", "link.pth", "nul\0l.pth"):
        with pytest.raises(FileNotFoundError, match=r"\.pth' does not exist"):
            read_tensor_file(tmp_path / name)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("damaged") / "model.pth"


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@given(form=st.sampled_from(sorted(FORMS)), data=st.data())
def test_damage_never_leads_to_another_error(place, form, data):
    """Cut a file anywhere or change a byte anywhere: it is read, or refused in one line that names it."""
    content = bytearray(FORMS[form])
    position = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        del content[position:]
    else:
        content[position] ^= data.draw(st.integers(1, 255))
    place.write_bytes(content)
    try:
        read_tensor_file(place)
    except ValueError as error:
        assert "model.pth" in str(error) and "\n" not in str(error) and "weights_only" not in str(error)
