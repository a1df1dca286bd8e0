"""Whatever way pictures are named, each is found once, and what is none is refused."""

import io
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest
from PIL import Image

from drmm_hf.data.picture_files import find_pictures


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "shots"
    (folder / "deep").mkdir(parents=True)
    for name in ("b.png", "a.jpg", "deep/c.png"):
        Image.new("RGB", (8, 6)).save(folder / name)
    (folder / "notes.txt").write_text("not a picture")
    return folder


def found(places, aside):
    return [(file.name, file.path, file.is_film) for file in find_pictures(places, aside)]


def test_files_folders_and_patterns_once(folder, tmp_path):
    names = [str(folder / name) for name in ("a.jpg", "b.png", "deep/c.png")]
    assert [name for name, *_ in found([folder], tmp_path)] == names[:2]
    assert [name for name, *_ in found([folder / "b.png", folder], tmp_path)] == [names[1], names[0]]
    assert [name for name, *_ in found([f"{folder}/**/*"], tmp_path)] == names
    (folder / "film.MP4").write_bytes(b"")
    assert found([folder], tmp_path)[2] == (str(folder / "film.MP4"), folder / "film.MP4", True)


def test_a_name_with_the_signs_of_a_pattern_is_a_file(folder, tmp_path):
    Image.new("RGB", (8, 6)).save(folder / "[1].png")
    assert [path for _, path, _ in found([folder / "[1].png"], tmp_path)] == [folder / "[1].png"]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("notes.txt", "notes.txt is no picture that Pillow can read"),
        ("empty", "empty holds no picture; a folder of images"),
        ("nowhere.png", "nowhere.png does not exist; images are files"),
        ("*.gif", "[*].gif matches no picture"),
    ],
)
def test_what_is_no_picture_is_named(place, message, folder, tmp_path):
    (folder / "empty").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        find_pictures([folder / place], tmp_path)


@pytest.fixture
def server(folder):
    """Return the address of a server that has one picture and one text, and asks who reads."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            known = {"/my%20dog.jpg?size=1": folder / "a.jpg", "/text": folder / "notes.txt"}
            path = known.get(self.path)
            self.send_response(404 if path is None else 200 if "drmm" in self.headers["User-Agent"] else 403)
            self.end_headers()
            self.wfile.write(b"" if path is None else path.read_bytes())

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_addresses_are_fetched(server, folder, tmp_path):
    (file,) = find_pictures([f"{server}/my%20dog.jpg?size=1"], tmp_path)
    assert file.stem == "my dog" and file.path.read_bytes() == (folder / "a.jpg").read_bytes()
    with pytest.raises(ValueError, match=f"{server}/text is no picture"):
        find_pictures([f"{server}/text"], tmp_path)
    with pytest.raises(OSError, match=f"{server}/nothing.jpg cannot be fetched: .*404"):
        find_pictures([f"{server}/nothing.jpg"], tmp_path)
    with pytest.raises(OSError, match="http://127.0.0.1:9/x.jpg cannot be fetched: "):
        find_pictures(["http://127.0.0.1:9/x.jpg"], tmp_path)


def test_standard_input_is_a_picture(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO((folder / "b.png").read_bytes())))
    (file,) = find_pictures(["-"], tmp_path)
    assert (file.name, file.stem, Image.open(file.path).size) == ("-", "stdin", (8, 6))
    with pytest.raises(ValueError, match="- is no picture"):
        find_pictures(["-"], tmp_path)  # nothing is left
