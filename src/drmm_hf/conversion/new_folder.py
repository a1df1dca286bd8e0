"""A folder that appears when it is complete."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_new(output: str | Path) -> Path:
    """Refuse a folder that holds something.

    Args:
        output (`str` or `Path`): the folder; it must not exist, or be empty.

    Returns:
        `Path`: the folder itself where `output` is a link.

    Raises:
        FileExistsError: if `output` exists and is not empty.
    """
    output = Path(os.path.realpath(output))  # a link is followed and stays
    if os.path.lexists(output) and not (output.is_dir() and not any(output.iterdir())):
        raise FileExistsError(f"output {str(output)!r} exists; give a new folder.")
    return output


@contextmanager
def new_folder(output: str | Path) -> Iterator[Path]:
    """Give a folder to fill, which becomes `output` if all goes well.

    Args:
        output (`str` or `Path`): see `check_new`.

    Yields:
        `Path`: the folder to fill; it lies beside `output`.

    Raises:
        FileExistsError: if `output` holds something, before the work or after it.
    """
    output = check_new(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as aside:
        folder = Path(aside) / output.name
        folder.mkdir()
        yield folder
        try:
            if output.exists():
                output.rmdir()
            folder.rename(output)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise FileExistsError(
                f"output {str(output)!r} was filled by another process; give a new folder."
            ) from error
