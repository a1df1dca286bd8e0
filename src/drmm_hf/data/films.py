"""Films: frames in, frames out, through PyAV."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image


FILM_SUFFIXES = frozenset((".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"))


class Frame(NamedTuple):
    """A frame of a film.

    Attributes:
        index (`int`): Its number, from 0.
        seconds (`float`): When it is shown, from the start.
        image (`PIL.Image.Image`): The picture as displayed.
    """

    index: int  # type: ignore[assignment]  # tuple.index, which nobody needs of a frame
    seconds: float
    image: Image.Image


class Film:
    """A film on disk, to be read once.

    Args:
        path (`str` or `Path`): The file.
        name (`str`, *optional*): What messages call it.
        every (`int`): Read each so many-th frame.

    Attributes:
        rate (`Fraction`): Frames that are read, a second.
        num_frames (`int` or None): How many are read, where the file tells.

    Raises:
        ValueError: If it is no film, or PyAV is not installed.
    """

    def __init__(self, path: str | Path, name: str | None = None, every: int = 1) -> None:
        av = _decoder()
        self.name, self.every = name or str(path), every
        try:
            self._container = av.open(str(path))
            self._stream = self._container.streams.video[0]
        except (av.FFmpegError, IndexError) as error:
            raise ValueError(f"{self.name} is no film that FFmpeg can read: {error}") from None
        self._stream.thread_type = "AUTO"
        self.rate = (self._stream.average_rate or Fraction(25)) / every
        self.num_frames = -(-self._stream.frames // every) or None

    def __iter__(self) -> Iterator[Frame]:
        """Yield frames in the order in which they are shown.

        Raises:
            ValueError: If the film is damaged; the message says where.
        """
        av, index = _decoder(), -1
        try:
            for index, frame in enumerate(self._container.decode(self._stream)):
                if index % self.every == 0:
                    yield Frame(index, frame.time or 0.0, _displayed(frame))
        except av.FFmpegError as error:
            raise ValueError(f"{self.name} is damaged after frame {index}: {error}") from None
        finally:
            self._container.close()


@contextmanager
def film_writer(path: str | Path, rate: Fraction) -> Iterator[Any]:
    """Write frames as an mp4 file, which is there once it is whole.

    Args:
        path (`str` or `Path`): The file.
        rate (`Fraction`): Frames a second.

    Yields:
        `Callable[[PIL.Image.Image], None]`: Call it with each frame; all have the size of the first.
    """
    av, path = _decoder(), Path(path)
    aside = path.with_name(f".{path.name}")
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    streams: list[Any] = []
    try:
        with av.open(str(aside), "w", format="mp4") as container:

            def write(image: Image.Image) -> None:
                if not streams:
                    streams.append(container.add_stream(codec, rate=rate))
                    streams[0].width, streams[0].height = (
                        side - side % 2 for side in image.size
                    )  # colours go by pairs
                    streams[0].pix_fmt = "yuv420p"
                (stream,) = streams
                frame = av.VideoFrame.from_image(image.crop((0, 0, stream.width, stream.height)))
                container.mux(stream.encode(frame))

            yield write
            for stream in streams:
                container.mux(stream.encode())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


# Signs of a display matrix (a, b, c, d), which shows pixel (x, y) at (a x + c y, b x + d y) -> what it does.
_TURNS = {
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}


def _displayed(frame: Any) -> Image.Image:
    """Return a frame as players show it: turned and mirrored by its display matrix; by other angles, it stays."""
    image = frame.to_image()
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            a, b, _, c, d, *_ = struct.unpack("=9i", bytes(data))  # of a camera that was held otherwise
            turn = _TURNS.get(tuple(round(value / 65536) for value in (a, b, c, d)))
            return image if turn is None else image.transpose(turn)
    return image


def _decoder():
    try:
        import av
    except ImportError as error:
        raise ValueError("films need PyAV: pip install 'drmm-hf[video]'") from error
    return av
