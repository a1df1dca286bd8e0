"""Files are whole or absent, and a folder has one run."""

import fcntl
import os
import resource
import signal
from contextlib import contextmanager

import pytest
from accelerate import Accelerator

from drmm_hf.evaluation.detections import Detections
from drmm_hf.evaluation.files import read_json, run_lock, run_user, whole_files, write_json, write_text
from drmm_hf.evaluation.parts import _write
from drmm_hf.evaluation.submission import write_archive


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
        assert run_user(tmp_path / "run").startswith(f"process {holder} on ")
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
    os.kill(reader, 0)
    assert run_user(tmp_path / "run") is None and run_user(tmp_path) is None and run_user(tmp_path / "none") is None
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


@contextmanager
def full_disk():
    """Let no file grow: the system's error is another one, and as bare."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def write_part(path):
    detections = Detections()
    detections.add(7, {"boxes": [[0, 0, 10, 20]], "scores": [0.5], "labels": [1]})
    _write(detections, path)


WRITERS = {
    "report.json": lambda path: write_json({"AP": 0.25}, path),
    "notes.txt": lambda path: write_text(path, "more"),
    "000000.npz": write_part,
    "detections_test_mine_results.zip": lambda path: write_archive({"AP": 0.25}, path),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("is_there", [False, True])
def test_a_full_disk_leaves_the_earlier_file_and_is_named(name, is_there, tmp_path):
    path = tmp_path / name
    if is_there:
        WRITERS[name](path)
    before = path.read_bytes() if is_there else None
    message = f"'{path}' cannot be written: File too large; make room there or write elsewhere, and repeat the call"
    with full_disk(), pytest.raises(OSError, match=message):
        WRITERS[name](path)
    assert [file.name for file in tmp_path.iterdir()] == [name] * is_there
    assert before is None or path.read_bytes() == before


def test_pictures_go_in_together_or_not_at_all(tmp_path):
    (tmp_path / "a.png").write_text("earlier")
    with pytest.raises(OSError, match=f"'{tmp_path}' cannot be written"), whole_files(tmp_path) as aside:
        (aside / "a.png").write_text("new")
        with full_disk():
            (aside / "b.png").write_text("new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.png": "earlier"}
    with whole_files(tmp_path) as aside:
        (aside / "a.png").write_text("new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.png": "new"}


def test_other_errors_of_the_system_name_their_file_themselves(tmp_path):
    (tmp_path / "report.json").mkdir()
    with pytest.raises(IsADirectoryError, match="report.json"):
        write_json({}, tmp_path / "report.json")
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_on_a_full_disk_a_folder_is_locked_all_the_same(tmp_path):
    """What cannot be written is said by whoever writes; nothing is left."""
    with full_disk(), pytest.raises(OSError, match="report.json' cannot be written"), run_lock(None, tmp_path / "run"):
        write_json({"AP": 0.25}, tmp_path / "run" / "report.json")
    assert not (tmp_path / "run").exists()


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
    ("place", "said"),
    [
        ("file", "which is a file"),
        ("file/run", "but {folder}/file is a file"),
        ("link", "which is a link to nothing"),
    ],
)
@pytest.mark.parametrize("is_main", [None, True])
def test_what_is_in_the_way_of_an_output_folder_is_named(place, said, is_main, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    path = tmp_path / place
    said = said.format(folder=tmp_path)
    message = f"output_dir is {str(path)!r}, {said}; the rule is a folder, or a name that is free"
    with pytest.raises(ValueError, match=message), run_lock(is_main and Accelerator(cpu=True), path):
        pass
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "link"]
