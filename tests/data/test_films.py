"""Frames are read as they are shown, and written whole."""

import struct
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from drmm_hf.data.films import Film, film_writer


def shade(index):
    return (20 * index, 255 - 20 * index, 90)


def write(path, count=12, size=(64, 48), rate=Fraction(10)):
    with film_writer(path, rate) as add:
        for index in range(count):
            add(Image.new("RGB", size, shade(index)))
    return path


@pytest.mark.parametrize("every", [1, 5])
def test_what_was_written_is_read(every, tmp_path):
    film = Film(write(tmp_path / "film.mp4"), every=every)
    frames = list(film)
    assert [frame.index for frame in frames] == list(range(0, 12, every)) and film.num_frames == len(frames)
    assert film.rate == Fraction(10) / every
    for frame in frames:
        assert frame.seconds == pytest.approx(frame.index / 10) and frame.image.size == (64, 48)
        assert abs(np.asarray(frame.image, dtype=int) - shade(frame.index)).max() < 12  # colours are compressed
    assert [path.name for path in tmp_path.iterdir()] == ["film.mp4"]


@pytest.mark.parametrize(
    ("matrix", "size", "corners"),
    [  # of a picture with the corners red, green (right), blue (below) and white
        ((1, 0, 0, 1), (64, 48), "rgbw"),
        ((-1, 0, 0, -1), (64, 48), "wbgr"),
        ((0, 1, -1, 0), (48, 64), "brwg"),  # clockwise: the top is at the right
        ((0, -1, 1, 0), (48, 64), "gwrb"),
        ((-1, 0, 0, 1), (64, 48), "grwb"),  # a mirror, as of a camera that looks at its owner
        ((1, 0, 0, -1), (64, 48), "bwrg"),
        ((0, 1, 1, 0), (48, 64), "rbgw"),
        ((0, -1, -1, 0), (48, 64), "wgbr"),
    ],
)
def test_a_camera_that_was_held_otherwise_is_put_upright(matrix, size, corners, tmp_path):
    """The matrix is written into the track's header, as phones do: a, b and u, c, d and v, then the place."""
    colours = {"r": (255, 0, 0), "g": (0, 255, 0), "b": (0, 0, 255), "w": (255, 255, 255)}
    picture = Image.new("RGB", (64, 48))
    for name, place in zip("rgbw", ((0, 0), (32, 0), (0, 24), (32, 24)), strict=True):
        picture.paste(colours[name], (*place, place[0] + 32, place[1] + 24))
    with film_writer(tmp_path / "film.mp4", Fraction(10)) as add:
        add(picture)
        add(picture)
    content = bytearray((tmp_path / "film.mp4").read_bytes())
    start = content.index(b"tkhd") + 44
    assert content[start : start + 36] == struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    a, b, c, d = (65536 * value for value in matrix)
    content[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (tmp_path / "film.mp4").write_bytes(content)
    for frame in Film(tmp_path / "film.mp4"):
        assert frame.image.size == size
        width, height = size
        seen = [frame.image.getpixel((x, y)) for y in (8, height - 9) for x in (8, width - 9)]
        for pixel, name in zip(seen, corners, strict=True):
            assert np.abs(np.subtract(pixel, colours[name])).max() < 30


def test_odd_sides_lose_a_pixel(tmp_path):
    (frame,) = Film(write(tmp_path / "film.mp4", 1, (65, 49)))
    assert frame.image.size == (64, 48)


def test_a_film_that_is_not_finished_is_not_there(tmp_path):
    with pytest.raises(KeyError), film_writer(tmp_path / "film.mp4", Fraction(10)) as add:
        add(Image.new("RGB", (64, 48)))
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_damaged_films_are_named(tmp_path):
    (tmp_path / "text.mp4").write_text("no film")
    with pytest.raises(ValueError, match="mine is no film that FFmpeg can read"):
        Film(tmp_path / "text.mp4", "mine")
    content = write(tmp_path / "film.mp4", 40).read_bytes()
    (tmp_path / "film.mp4").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="film.mp4 is (no film|damaged)"):
        list(Film(tmp_path / "film.mp4"))


def test_without_the_decoder_its_name_is_said(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ValueError, match=r"films need PyAV: pip install 'drmm-hf\[video\]'"):
        Film("film.mp4")
