"""Files are whole or absent, and a folder has one run."""

import fcntl
import os
import signal

import pytest
from accelerate import Accelerator

from drmm_hf.evaluation.files import run_lock


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
