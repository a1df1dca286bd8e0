"""Give the commands what they should not be given, and write down what happens.

    python scripts/hostile_input.py docs/reliability.md

Without a file, the table is printed. Each case runs in this process on a tiny random detector and generated pictures;
its outcome must be the one that `CASES` names, or the script says so and exits with 1.
"""

import atexit
import contextlib
import io
import json
import pickle
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from measure_training_memory import RECIPE
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from drmm_cli import main
from drmm_hf import DrmmConfig, DrmmForObjectDetection, DrmmImageProcessor
from drmm_hf.data.coco import save_coco
from drmm_hf.data.generated import generate_shapes


class Place:
    """A folder with a tiny detector, pictures with labels, a recipe and room for what a case makes.

    Args:
        folder (`Path`): An empty folder; `model`, `data`, `recipe.yaml` and `detections.json` are made in it.
    """

    def __init__(self, folder: Path):
        self.folder, self.model, self.data = folder, folder / "model", folder / "data"
        torch.manual_seed(0)
        names = dict(enumerate(("ellipse", "rectangle", "triangle")))
        model = DrmmForObjectDetection(DrmmConfig(**RECIPE["model"], id2label=names, category_ids=[2, 3, 7]))
        for part in (model, DrmmImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})):
            part.save_pretrained(self.model)
        for split, seed in (("train", 0), ("val", 1)):
            save_coco(generate_shapes(6, seed, image_size=(64, 80)), self.data, split)
        recipe = {"model": RECIPE["model"], "data": {"shortest_edge": 64, "longest_edge": 96, "num_workers": 0}}
        recipe["training"] = {"batch_size": 2, "max_steps": 1, "warmup_steps": 0, "trackers": []}
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(yaml.safe_dump(recipe))

    @property
    def annotations(self) -> Path:
        """Return the annotation file of the split val."""
        return self.data / "annotations" / "instances_val.json"

    def path(self, name: str) -> Path:
        """Return a new path in a folder of its own."""
        place = Path(tempfile.mkdtemp(dir=self.folder))
        return place / name


def changed(place: Place, change: Callable[[dict], object]) -> str:
    """Return a copy of the data whose validation annotations are changed, and thus also its training annotations."""
    data = place.path("data")
    shutil.copytree(place.data, data)
    for split in ("train", "val"):
        path = data / "annotations" / f"instances_{split}.json"
        content = json.loads(path.read_text())
        content = change(content) or content
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(data)


def with_file(place: Place, name: str, content: str | bytes | None) -> str:
    """Return a copy of the model with another file in it; None removes it."""
    model = place.path("model")
    shutil.copytree(place.model, model)
    if content is None:
        (model / name).unlink()
    else:
        (model / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return str(model)


def with_config(place: Place, **fields: object) -> str:
    """Return a copy of the model with other fields in its config."""
    config = json.loads((place.model / "config.json").read_text())
    return with_file(place, "config.json", json.dumps(config | fields))


def with_weights(place: Place, change: Callable[[dict], object]) -> str:
    """Return a copy of the model with other tensors."""
    model = Path(with_file(place, "config.json", (place.model / "config.json").read_bytes()))
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return str(model)


def picture(place: Place, name: str, content: Image.Image | bytes | None, **options: object) -> str:
    """Return the path of a picture file; None makes a folder."""
    path = place.path(name)
    if content is None:
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content.save(path, **options)
    return str(path)


def plain(*size: int, mode: str = "RGB") -> Image.Image:
    """Return a picture of noise, (width, height)."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 255, (size[1], size[0], len(mode) if mode != "P" else 1), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze() if mode in ("L", "P") else pixels, mode if mode != "P" else "L").convert(
        mode
    )


def encoded(image: Image.Image, form: str) -> bytes:
    """Return the bytes of a picture file."""
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


def bomb() -> bytes:
    """Return a small PNG file that claims 50,000 x 50,000 pixels."""
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    chunks = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))
    )
    return b"\x89PNG\r\n\x1a\n" + chunks


class Code:
    """What runs code when it is unpickled."""

    def __reduce__(self):
        """Name what to call."""
        return print, ("code from a checkpoint ran",)


def predict(place: Place, path: str) -> list[str]:
    """Return the command that detects in a picture."""
    return ["predict", str(place.model), path, "--output", str(place.path("out"))]


def detect(place: Place, model: str) -> list[str]:
    """Return the command that detects with another model."""
    return ["predict", model, str(next((place.data / "val").iterdir())), "--output", str(place.path("out"))]


def train(place: Place, data: str, *options: str) -> list[str]:
    """Return the command that trains on other data."""
    return ["train", str(place.recipe), "--data", data, "--output", str(place.path("run")), *options]


def recipe(place: Place, text: str) -> list[str]:
    """Return the command that trains by another recipe."""
    path = place.path("recipe.yaml")
    path.write_text(text)
    return ["train", str(path), "--data", str(place.data), "--output", str(place.path("run"))]


def results(place: Place, entries: object) -> list[str]:
    """Return the command that measures detections from a file."""
    path = place.path("results.json")
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return ["evaluate", str(place.data), "--detections", str(path), "--output", str(place.path("out"))]


def result(**fields: object) -> dict:
    """Return a detection, with other fields."""
    return {"image_id": 1, "category_id": 2, "bbox": [4.0, 4.0, 20.0, 20.0], "score": 0.5} | fields


def first(content: dict, **fields: object) -> None:
    """Change the first annotation."""
    content["annotations"][0] |= fields


def first_image(content: dict, **fields: object) -> None:
    """Change the first picture's record."""
    content["images"][0] |= fields


@dataclass(frozen=True)
class Case:
    """One thing that was tried.

    Attributes:
        what (`str`): In words.
        command (`Callable[[Place], list[str]]`): Makes the input and returns the words behind `drmm`.
        message (`str`, *optional*): What the error says, a regular expression; None: it is no error.
        holds (`str`): What a right result is, where it is no error.
    """

    what: str
    command: Callable[[Place], list[str]]
    message: str | None = None
    holds: str = ""


def _turned() -> bytes:
    image, exif = plain(40, 80), Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    image.save(file, "JPEG", exif=exif)
    return file.getvalue()


CASES: dict[str, list[Case]] = {
    "Pictures": [
        Case("1 x 1", lambda p: predict(p, picture(p, "a.png", plain(1, 1))), holds="a result"),
        Case("1 x 10,000", lambda p: predict(p, picture(p, "a.png", plain(1, 10_000))), holds="a result"),
        Case("10,000 x 1", lambda p: predict(p, picture(p, "a.png", plain(10_000, 1))), holds="a result"),
        Case(
            "10,000 x 10,000",
            lambda p: predict(p, picture(p, "a.png", Image.new("RGB", (10_000, 10_000)))),
            holds="a result",
        ),
        Case("50,000 x 50,000 in 1 kB", lambda p: predict(p, picture(p, "a.png", bomb())), "bomb|pixels"),
        Case("no bytes", lambda p: predict(p, picture(p, "a.png", b"")), "cannot be (read|decoded)|no picture"),
        Case(
            "half a JPEG", lambda p: predict(p, picture(p, "a.jpg", encoded(plain(80, 64), "JPEG")[:900])), "truncated"
        ),
        Case(
            "half a PNG",
            lambda p: predict(p, picture(p, "a.png", encoded(plain(80, 64), "PNG")[:900])),
            "truncated|cut",
        ),
        Case("text named .png", lambda p: predict(p, picture(p, "a.png", b"hello")), "no picture"),
        Case("a folder named .png", lambda p: predict(p, picture(p, "a.png", None)), "no picture"),
        Case("CMYK", lambda p: predict(p, picture(p, "a.jpg", plain(80, 64, mode="CMYK"))), holds="a result"),
        Case("palette", lambda p: predict(p, picture(p, "a.png", plain(80, 64, mode="P"))), holds="a result"),
        Case("alpha", lambda p: predict(p, picture(p, "a.png", plain(80, 64, mode="RGBA"))), holds="a result"),
        Case("grey", lambda p: predict(p, picture(p, "a.png", plain(80, 64, mode="L"))), holds="a result"),
        Case(
            "16 bits", lambda p: predict(p, picture(p, "a.png", Image.fromarray(np.zeros((64, 80), np.uint16)))), "16"
        ),
        Case(
            "animated GIF",
            lambda p: predict(p, picture(p, "a.gif", plain(80, 64), save_all=True, append_images=[plain(80, 64)])),
            holds="a result of its first picture",
        ),
        Case(
            "turned by EXIF",
            lambda p: predict(p, picture(p, "a.jpg", _turned())),
            holds="a result, boxes in the turned picture",
        ),
        Case("a name that is not there", lambda p: predict(p, str(p.folder / "none.png")), "does not exist|none.png"),
    ],
    "Labels": [
        Case(
            "box without width",
            lambda p: train(p, changed(p, lambda c: first(c, bbox=[3, 3, 0, 5]))),
            "width|size|area",
        ),
        Case(
            "negative height", lambda p: train(p, changed(p, lambda c: first(c, bbox=[3, 3, 9, -5]))), "without area"
        ),
        Case(
            "NaN in a box",
            lambda p: train(p, changed(p, lambda c: first(c, bbox=[3, float("nan"), 9, 5]))),
            "bbox|finite|nan",
        ),
        Case("text in a box", lambda p: train(p, changed(p, lambda c: first(c, bbox=[3, "x", 9, 5]))), "bbox"),
        Case("three numbers in a box", lambda p: train(p, changed(p, lambda c: first(c, bbox=[3, 4, 9]))), "bbox"),
        Case(
            "box outside its picture",
            lambda p: train(p, changed(p, lambda c: first(c, bbox=[300, 300, 9, 5]))),
            "without area inside",
        ),
        Case(
            "corners instead of sizes",
            lambda p: train(
                p, changed(p, lambda c: [a.update(bbox=[40, 30, 60, 60]) for a in c["annotations"]] and None)
            ),
            "left, top, right, bottom",
        ),
        Case("unknown category", lambda p: train(p, changed(p, lambda c: first(c, category_id=77))), "77"),
        Case("unknown picture", lambda p: train(p, changed(p, lambda c: first(c, image_id=777))), "777"),
        Case(
            "two pictures of one id",
            lambda p: train(p, changed(p, lambda c: c["images"].append(c["images"][0]))),
            "id",
        ),
        Case("texts as ids", lambda p: train(p, changed(p, lambda c: first_image(c, id="one"))), "id"),
        Case(
            "picture without size", lambda p: train(p, changed(p, lambda c: first_image(c, width=None))), "width|size"
        ),
        Case(
            "swapped sides", lambda p: train(p, changed(p, lambda c: first_image(c, width=64, height=80))), "size|80"
        ),
        Case(
            "missing file", lambda p: train(p, changed(p, lambda c: first_image(c, file_name="none.png"))), "none.png"
        ),
        Case(
            "name that leads out of the folder",
            lambda p: train(p, changed(p, lambda c: first_image(c, file_name="../../model/config.json"))),
            "config.json",
        ),
        Case("no categories", lambda p: train(p, changed(p, lambda c: c.update(categories=[]))), "categor"),
        Case(
            "two categories of one name",
            lambda p: train(p, changed(p, lambda c: c["categories"][0].update(name=c["categories"][1]["name"]))),
            "name|square",
        ),
        Case(
            "no annotations",
            lambda p: train(p, changed(p, lambda c: c.update(annotations=[]))),
            "no (boxes|objects|annotations)",
        ),
        Case(
            "a list instead of an object",
            lambda p: train(p, changed(p, lambda c: "[1, 2]")),
            "annotations|object|COCO",
        ),
        Case("half a file", lambda p: train(p, changed(p, lambda c: json.dumps(c)[:400])), "json"),
        Case(
            "a bad box, left out on request",
            lambda p: train(p, changed(p, lambda c: first(c, bbox=[3, 3, 0, 5])), "--invalid-data", "skip"),
            holds="trains; the count is said",
        ),
    ],
    "Configs": [
        Case("num_queries -1", lambda p: detect(p, with_config(p, num_queries=-1)), "num_queries"),
        Case("num_queries 16.5", lambda p: detect(p, with_config(p, num_queries=16.5)), "num_queries"),
        Case("num_stages 0", lambda p: detect(p, with_config(p, num_stages=0)), "num_stages"),
        Case("hidden_size 'big'", lambda p: detect(p, with_config(p, hidden_size="big")), "hidden_size"),
        Case(
            "heads that do not divide",
            lambda p: detect(p, with_config(p, num_attention_heads=3)),
            "num_attention_heads",
        ),
        Case("an unknown decoder", lambda p: detect(p, with_config(p, decoder_type="rcnn")), "decoder_type"),
        Case("NaN as a weight", lambda p: detect(p, with_config(p, mcm_weight=float("nan"))), "mcm_weight"),
        Case("a misspelt field", lambda p: detect(p, with_config(p, num_querys=5)), "num_queries"),
        Case("an unknown model_type", lambda p: detect(p, with_config(p, model_type="drm")), "drm"),
        Case("an empty list", lambda p: detect(p, with_file(p, "config.json", "[]")), "config.json"),
        Case("null", lambda p: detect(p, with_file(p, "config.json", "null")), "config.json"),
        Case("half a file", lambda p: detect(p, with_file(p, "config.json", '{"model_type": ')), "config.json"),
        Case(
            "an empty list as the processor",
            lambda p: detect(p, with_file(p, "preprocessor_config.json", "[]")),
            "preprocessor_config.json",
        ),
        Case(
            "no processor",
            lambda p: detect(p, with_file(p, "preprocessor_config.json", None)),
            "preprocessor|processor",
        ),
    ],
    "Checkpoints": [
        Case(
            "half the weights",
            lambda p: detect(
                p, with_file(p, "model.safetensors", (p.model / "model.safetensors").read_bytes()[:5000])
            ),
            "header|weights",
        ),
        Case("no bytes", lambda p: detect(p, with_file(p, "model.safetensors", b"")), "header|weights"),
        Case("no weights", lambda p: detect(p, with_file(p, "model.safetensors", None)), "safetensors|weights"),
        Case("a tensor is missing", lambda p: detect(p, with_weights(p, lambda t: t.pop(sorted(t)[-1]))), "missing"),
        Case(
            "a tensor of another shape",
            lambda p: detect(p, with_weights(p, lambda t: t.update({sorted(t)[-1]: torch.zeros(3, 3)}))),
            "shape",
        ),
        Case(
            "weights that are NaN",
            lambda p: detect(
                p, with_weights(p, lambda t: [v.fill_(float("nan")) for v in t.values() if v.is_floating_point()])
            ),
            "finite|nan",
        ),
        Case("a pickle with code instead", lambda p: _pickled(p), "safetensors|weights|pickle|code"),
        Case("a public checkpoint with code", lambda p: _public(p), "code|pickle|weights"),
    ],
    "Results": [
        Case("of an unknown category", lambda p: results(p, [result(category_id=9)]), "category"),
        Case("of an unknown picture", lambda p: results(p, [result(image_id=99)]), "99"),
        Case(
            "the same twice",
            lambda p: results(p, [result(), result()]),
            holds="a result; the second counts as a duplicate",
        ),
        Case("without any", lambda p: results(p, []), holds="a result, AP 0"),
        Case("NaN as a score", lambda p: results(p, [result(score=float("nan"))]), "score"),
        Case("a score above 1", lambda p: results(p, [result(score=1.5)]), "score"),
        Case("text as a score", lambda p: results(p, [result(score="high")]), "score"),
        Case("three numbers as a box", lambda p: results(p, [result(bbox=[1, 2, 3])]), "bbox"),
        Case("NaN in a box", lambda p: results(p, [result(bbox=[1, 2, float("nan"), 3])]), "bbox"),
        Case("without a box", lambda p: results(p, [{"image_id": 1, "category_id": 2, "score": 0.5}]), "bbox"),
        Case("an object instead of a list", lambda p: results(p, {"a": 1}), "list"),
        Case("half a file", lambda p: results(p, '[{"image_id": 1,'), "json"),
    ],
    "Recipes": [
        Case("unknown field", lambda p: recipe(p, "training: {learning_rat: 1}"), "learning_rate"),
        Case("unknown section", lambda p: recipe(p, "modle: {num_queries: 5}"), "model"),
        Case("a number as a text", lambda p: recipe(p, "training: {max_steps: many}"), "max_steps"),
        Case("a negative bound", lambda p: recipe(p, "training: {max_steps: -5}"), "max_steps"),
        Case("no yaml", lambda p: recipe(p, "training: [1, {"), "yaml"),
        Case("a list", lambda p: recipe(p, "- 1"), "section|recipe"),
        Case(
            "code behind a yaml tag",
            lambda p: recipe(p, "training: !!python/object/apply:os.system ['echo code ran']"),
            "yaml",
        ),
        Case(
            "a field of the command line that is none",
            lambda p: train(p, str(p.data), "--learning-rat", "1"),
            "learning.rate",
        ),
    ],
    "Folders": [
        Case("the output is a file", lambda p: [*train(p, str(p.data))[:-1], str(p.recipe)], "output|recipe.yaml"),
        Case("another run is in the folder", lambda p: _locked(p), "in use"),
        Case("a finished run is there", lambda p: _finished(p), "--resume"),
        Case("no such data", lambda p: train(p, str(p.folder / "none")), "none"),
    ],
}


def _pickled(place: Place) -> list[str]:
    model = with_file(place, "model.safetensors", None)
    Path(model, "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Code()}))
    return detect(place, model)


def _public(place: Place) -> list[str]:
    path = place.path("epoch_36.pth")
    torch.save({"state_dict": {"backbone.conv1.weight": Code()}}, path)
    return ["convert", str(path), str(place.path("out"))]


_HOLDER = """
import sys, time
from drmm_hf.evaluation.files import run_lock
with run_lock(None, sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def _locked(place: Place) -> list[str]:
    words = train(place, str(place.data))
    holder = subprocess.Popen([sys.executable, "-c", _HOLDER, words[-1]], stdout=subprocess.PIPE)
    holder.stdout.readline()
    atexit.register(holder.kill)
    return words


def _finished(place: Place) -> list[str]:
    words = train(place, str(place.data))
    call(words)
    return words


def call(words: list[str]) -> tuple[int, str]:
    """Run a command in this process.

    Args:
        words (`list[str]`): What stands behind `drmm`.

    Returns:
        `tuple[int, str]`: Its exit code, and the last line that it wrote to its standard error.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main(words)
        except SystemExit as error:
            code = error.code
    lines = [line for line in said.getvalue().splitlines() if line.strip()]
    return code or 0, lines[-1] if lines else ""


def try_all(place: Place) -> Iterator[tuple[str, Case, list[str], int, str]]:
    """Run every case.

    Args:
        place (`Place`): Where.

    Yields:
        `tuple`: Group, case, command, exit code and the last line of its standard error.
    """
    cases = [(group, case) for group, members in CASES.items() for case in members]
    for group, case in tqdm(cases, desc="cases", delay=2):
        words = case.command(place)
        yield group, case, words, *call(words)


def is_right(case: Case, code: int, said: str) -> bool:
    """Tell whether an outcome is the one that the case names.

    Args:
        case (`Case`): The case.
        code (`int`): Exit code.
        said (`str`): Last line of the standard error.

    Returns:
        `bool`: True if so.
    """
    if case.message is None:
        return code == 0
    is_defect = "--debug shows" in said  # as the command line says of errors that nobody foresaw
    return code != 0 and not is_defect and re.search(case.message, said, re.IGNORECASE) is not None


def cleaned(said: str, place: Place) -> str:
    """Return a message as a cell of a table: without the names of temporary folders and what all of its kind say.

    Args:
        said (`str`): The message.
        place (`Place`): Whose folder is left out.

    Returns:
        `str`: One line without backticks and bars.
    """
    said = re.sub(r"tmp[a-z0-9_]{8}/", "", said.replace(f"{place.folder}/", ""))
    said = said.replace("; correct them (drmm doctor lists all), or leave such pictures and boxes out with", "; ...")
    return said.replace("`", "'").replace("|", "/")


def table(place: Place) -> tuple[list[str], list[str]]:
    """Run every case and write the table.

    Args:
        place (`Place`): Where.

    Returns:
        `tuple[list[str], list[str]]`: Lines of Markdown, and a line for each outcome that is not the expected one.
    """
    lines, wrong, heading = [], [], ""
    for group, case, words, code, said in try_all(place):
        if group != heading:
            heading = group
            lines += ["", f"**{group}**", "", "| what | command | what happened |", "|---|---|---|"]
        said = cleaned(said, place)
        outcome = case.holds if case.message is None else f"`{said.removeprefix(f'drmm {words[0]}: ')}`"
        lines.append(f"| {case.what} | `drmm {words[0]}` | {outcome} |")
        if not is_right(case, code, said):
            wrong.append(f"{group}, {case.what}: exit code {code}, {said!r}; expected {case.message or case.holds!r}")
    return lines[1:], wrong


_BEGIN, _END = "<!-- hostile input: written by scripts/hostile_input.py -->", "<!-- end of hostile input -->"

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        written, unexpected = table(Place(Path(folder)))
    if len(sys.argv) > 1:
        page = Path(sys.argv[1])
        before, _, rest = page.read_text(encoding="utf-8").partition(_BEGIN)
        page.write_text(
            "\n".join([f"{before}{_BEGIN}", "", *written, "", _END + rest.partition(_END)[2]]), encoding="utf-8"
        )
    else:
        print("\n".join(written))
    print("\n".join(unexpected), file=sys.stderr)
    raise SystemExit(len(unexpected) > 0)
