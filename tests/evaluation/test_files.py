"""Files are whole or absent, and a folder has one run."""

import fcntl
import os
import resource
import signal

import pytest
from accelerate import Accelerator

from drmm_hf.evaluation.files import read_json, run_lock, write_json, write_text


def test_another_run_is_kept_out_until_its_process_is_gone(tmp_path):
    """The holder is killed, and what it started lives on, as processes that read pictures do for a while."""
    accelerator = Accelerator(cpu=True)
    reads, writes = os.pipe()
    holder = os.fork()
    if holder == 0:
        try:
            with run_lock(accelerator, tmp_path / "run"):
                reader = os.fork()
                if reader:
                    os.write(writes, str(reader).encode())
                signal.pause()
        finally:
            os._exit(1)
    reader = int(os.read(reads, 20))
    try:
        message = f"run' is in use by process {holder} on .*: name another folder"
        with pytest.raises(ValueError, match=message), run_lock(accelerator, tmp_path / "run"):
            pass
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
    os.kill(reader, 0)
    try:
        with run_lock(accelerator, tmp_path / "run"):
            assert f"process {os.getpid()} on " in (tmp_path / "run" / "run.lock").read_text()
    finally:
        os.kill(reader, signal.SIGKILL)


def test_where_there_are_no_locks_runs_go_on(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with run_lock(Accelerator(cpu=True), tmp_path / "run"):
        assert (tmp_path / "run").is_dir()


def test_a_full_disk_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "report.json"
    write_json({"AP": 0.5}, path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(OSError):
            write_json({"AP": 0.25}, path)
        with pytest.raises(OSError):
            write_text(tmp_path / "new.json", "{}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"] and read_json(path) == {"AP": 0.5}


@pytest.mark.parametrize("text", ['[{"image_id": 1', "[" * 100_000, b"\xff\xfe"], ids=["cut", "deep", "bytes"])
def test_what_is_no_json_is_named(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match="results.json is not valid json: "):
        read_json(path)


def test_a_run_that_wrote_nothing_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match="wrong"), run_lock(None, tmp_path / "run"):
        raise ValueError("wrong")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_was_there_stays_even_if_it_is_a_link(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    monkeypatch.chdir(tmp_path / "empty")
    for name in (tmp_path / "empty", tmp_path / "link", "."):
        with pytest.raises(ValueError, match="^wrong$"), run_lock(None, name):
            raise ValueError("wrong")
        assert (tmp_path / "link").is_dir() and list((tmp_path / "empty").iterdir()) == []


def test_the_mark_of_windows_editors_is_no_content(tmp_path):
    (tmp_path / "file.json").write_text('{"AP": 0.5}', encoding="utf-8-sig")
    assert read_json(tmp_path / "file.json") == {"AP": 0.5}


@pytest.mark.parametrize(
    ("place", "said"), [("file", "a file"), ("file/run", "a file"), ("link", "a link to nothing")]
)
@pytest.mark.parametrize("is_main", [None, True])
def test_what_is_in_the_way_of_an_output_folder_is_named(place, said, is_main, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    path = tmp_path / place
    taken = tmp_path / place.partition("/")[0]
    message = f"output_dir is {str(path)!r}, but {taken} is {said}; the rule is a folder, or a name that is free"
    with pytest.raises(ValueError, match=message), run_lock(is_main and Accelerator(cpu=True), path):
        pass
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "link"]
