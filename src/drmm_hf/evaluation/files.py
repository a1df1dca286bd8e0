"""Files that are whole or absent, and folders that one run at a time writes."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar


if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

Content = TypeVar("Content")

# No room on the disk, none for this user, none for this process.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def read_json(path: str | Path) -> Any:
    """Read a json file.

    Args:
        path (`str` or `Path`): The file.

    Returns:
        `Any`: Its content.

    Raises:
        ValueError: If it is no valid json; the message names it.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))  # Windows' editors put a mark before it
    except RecursionError:
        raise ValueError(f"{path} is not valid json: it is nested too deeply") from None
    except ValueError as error:  # bad json, or bytes that are not utf-8
        raise ValueError(f"{path} is not valid json: {error}") from None


@contextmanager
def naming_full_disk(path: str | Path) -> Iterator[None]:
    """Say what a full disk has no room for, and what to do: this error of the system, unlike others, names no file.

    Args:
        path (`str` or `Path`): The file or folder that is written while the context lasts.

    Raises:
        OSError: If its disk or the share of the user is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise OSError(
            f"{str(path)!r} cannot be written: {error.strerror}; make room there or write elsewhere, and repeat the "
            "call. What was written before is whole."
        ) from error


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Write a file aside and rename it when it is whole: a kill or a full disk leaves the earlier one.

    Args:
        path (`str` or `Path`): The file.

    Yields:
        `Path`: Where to write it, `<path>.partial`.

    Raises:
        OSError: As `naming_full_disk`.
    """
    partial_file = Path(path).with_name(Path(path).name + ".partial")
    try:
        with naming_full_disk(path):
            yield partial_file
            os.replace(partial_file, path)
    except BaseException:
        partial_file.unlink(missing_ok=True)
        raise


@contextmanager
def whole_files(folder: str | Path) -> Iterator[Path]:
    """Write files aside and move them into a folder when all are whole, as pictures that others' code draws.

    Args:
        folder (`str` or `Path`): The folder.

    Yields:
        `Path`: Where to write them, a folder inside.

    Raises:
        OSError: As `naming_full_disk`.
    """
    with naming_full_disk(folder), TemporaryDirectory(dir=folder) as aside:
        yield Path(aside)
        for path in Path(aside).iterdir():
            os.replace(path, Path(folder) / path.name)


def write_text(path: str | Path, text: str) -> None:
    """Write a small file that is always whole, see `whole_file`.

    Args:
        path (`str` or `Path`): The file.
        text (`str`): Its contents.
    """
    with whole_file(path) as partial_file:
        partial_file.write_text(text, encoding="utf-8")


def write_json(content: Content, path: str | Path) -> Content:
    """Write figures as json that is always whole, None for what is not defined.

    Args:
        content (`Any`): The figures.
        path (`str` or `Path`): The file.

    Returns:
        `Any`: The content.
    """
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
    return content


def make_folder(path: str | Path, name: str = "folder") -> None:
    """Make a folder and those above it, unless they are there.

    Args:
        path (`str` or `Path`): The folder.
        name (`str`): What it is called in the message, such as the argument that names it.

    Raises:
        ValueError: If something else is there.
        OSError: As `naming_full_disk`.
    """
    path = Path(path)
    try:
        with naming_full_disk(path):
            path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        taken = next(place for place in (path, *path.parents) if place.is_symlink() or place.exists())
        which, what = "which" if taken == path else f"but {taken}", "a file" if taken.exists() else "a link to nothing"
        raise ValueError(
            f"{name} is {str(path)!r}, {which} is {what}; the rule is a folder, or a name that is free."
        ) from None


@contextmanager
def run_lock(processes: Accelerator | PartialState | None, output_dir: str | Path) -> Iterator[None]:
    """Keep other runs out of a folder while the context lasts.

    The lock is the system's, on the file `run.lock`: it ends with the process, however that ends. Where there are no
    such locks (Windows, some network drives), nothing is locked.

    Args:
        processes (`Accelerator` or `PartialState`, *optional*): Their main process holds the lock; all call this.
            None: this process alone.
        output_dir (`str` or `Path`): Folder of the run, made if it does not exist.

    Raises:
        ValueError: If another run holds the lock, or no folder can be there, in every process; the message says
            which process it is, on which host, or what is in the way.
    """
    message, file, output_dir = None, None, Path(output_dir)
    was_there = output_dir.exists()
    with ExitStack() as stack:
        if processes is None or processes.is_main_process:
            try:
                make_folder(output_dir, "output_dir")
            except ValueError as error:
                message = str(error)
            else:
                file = stack.enter_context((output_dir / "run.lock").open("a+"))
                if not _lock(file):
                    file.seek(0)
                    holder = file.read().strip() or "another run"
                    message = f"output_dir {str(output_dir)!r} is in use by {holder}: "
                    message += "name another folder, or end that run first"
        if processes is not None:
            from accelerate.utils import broadcast_object_list

            message = broadcast_object_list([message])[0]
        if message is not None:
            raise ValueError(message)
        try:
            yield
        finally:
            # Where the run ended before it wrote anything, nothing is left of it.
            if file is not None and [path.name for path in output_dir.iterdir()] == ["run.lock"]:
                (output_dir / "run.lock").unlink()
                if not was_there:
                    output_dir.rmdir()


def run_user(output_dir: str | Path) -> str | None:
    """Tell who uses the folder of a run, without a claim to it.

    Args:
        output_dir (`str` or `Path`): The folder.

    Returns:
        `str` or None: Process and host of the run that holds the lock; None if there is none, or no such locks.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        with (Path(output_dir) / "run.lock").open() as file:
            holder = file.read().strip() or "another run"
            try:
                fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # until the file is closed
            except OSError as error:
                return holder if error.errno in (errno.EACCES, errno.EAGAIN) else None
    except OSError:  # no such file, or none that may be read
        pass
    return None


def _lock(file) -> bool:
    """Lock an open file and write into it who holds it; False if another process does."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        # Not `flock`, which processes that read pictures would inherit, and keep for a while after a kill.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    with suppress(OSError):  # on a full disk, nobody is told who holds it
        os.truncate(file.fileno(), 0)
        os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return True
