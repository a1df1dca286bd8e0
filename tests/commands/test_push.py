"""`drmm push` and transformers' `push_to_hub`, to a process that has no drmm_hf."""

import json
import re
import socket

import numpy as np
import pytest
import torch
from PIL import Image

from drmm_cli import main
from drmm_hf import DrmmForObjectDetection, DrmmImageProcessor
from elsewhere import answers_elsewhere
from hub_stand_in import WRITER
from trained_run import DETECTOR, make_evaluation, make_run


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_published_gives_the_same_where_the_package_is_absent(hub, tmp_path, capsys):
    """Both decoders, by the command and by transformers' own ways, and the folder of a dry run."""
    image = np.random.default_rng(0).integers(0, 256, (45, 60, 3), dtype=np.uint8)
    np.save(tmp_path / "picture.npy", image)
    models = {}
    for decoder in DETECTOR:
        best = make_run(tmp_path / decoder, decoder)
        make_evaluation(tmp_path / decoder / "test", best)
        output = tmp_path / "out" / decoder
        command = ["push", str(best), "--repo-id", f"me/{decoder}", "--output", str(output)]
        assert main([*command, "--dry-run"]) == 0
        assert "nothing was uploaded" in capsys.readouterr().out and not hub.commits
        dry = files(output)
        assert main([*command, "--private"]) == 0
        (commit,) = hub.commits
        assert commit.files == dry == files(output) and hub.repos[f"me/{decoder}"].private
        assert f"published: {hub.endpoint}/me/{decoder}/commit/" in capsys.readouterr().out
        hub.commits.clear()
        models[f"me/{decoder}"] = best

    model, processor = (cls.from_pretrained(best) for cls in (DrmmForObjectDetection, DrmmImageProcessor))
    for part in (model, processor):
        part.push_to_hub("me/pushed", private=True)
        part.save_pretrained(str(tmp_path / "saved"), push_to_hub=True, repo_id="me/saved")
        part.save_pretrained(tmp_path / "plain")
    assert hub.repos["me/pushed"].private and "requirements.txt" in hub.repos["me/pushed"].branches["main"]
    pushed, saved = (hub.repos[f"me/{name}"].branches["main"] for name in ("pushed", "saved"))
    assert pushed.keys() - {"README.md"} == saved.keys() - {"README.md"}
    assert all(pushed[name] == saved[name] for name in saved.keys() - {"README.md"})
    models |= {output: best, "me/pushed": best}
    # The code goes to the Hub, not into folders that are saved for oneself.
    assert {path.suffix for path in (tmp_path / "plain").iterdir()} == {".json", ".safetensors"}
    assert "auto_map" not in (tmp_path / "plain" / "config.json").read_text()

    variables = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": WRITER, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    for name, answer in answers_elsewhere(models, tmp_path, **variables).items():
        best = next(best for one, best in models.items() if str(one) == name)
        model, processor = (cls.from_pretrained(best) for cls in (DrmmForObjectDetection, DrmmImageProcessor))
        inputs = processor(images=[image], return_tensors="pt")
        with torch.no_grad():
            outputs = model.eval()(**inputs)
        result = processor.post_process_object_detection(outputs, 0.05, [image.shape[:2]], interval=0.9)[0]
        assert len(result["scores"]) > 0
        for part, expected in {"inputs": inputs, "outputs": outputs, "result": result}.items():
            for key, value in answer[part].items():
                torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5, msg=f"{name} {part} {key}")
        scores = [row["score"] for row in answer["detections"]]
        assert scores == pytest.approx(result["scores"].tolist(), abs=1e-5)


def test_a_pull_request_to_a_branch(hub, tmp_path, capsys):
    best = make_run(tmp_path / "cells")
    command = ["push", str(best), "--repo-id", "me/cells", "--output", str(tmp_path / "out")]
    assert main([*command, "--revision", "v2", "--message", "Second"]) == 0
    assert main([*command, "--revision", "v2", "--create-pr"]) == 0
    first, second = hub.commits
    assert (first.revision, first.message, first.create_pr) == ("v2", "Second", False)
    assert (second.revision, second.create_pr) == ("v2", True) and first.files == second.files
    said = capsys.readouterr().out
    assert "proposed in" in said and "note  no result file was found" in said and "--license" in said


def test_the_card_s_lines_run(tmp_path, monkeypatch, capsys):
    best = make_run(tmp_path / "cells")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a dry run asks nobody"))
    assert main(["push", str(best), "--repo-id", "me/cells", "--dry-run"]) == 0
    Image.new("RGB", (60, 45), "white").save("picture.jpg")
    text = (tmp_path / "runs" / "push" / "me" / "cells" / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text.replace('"me/cells"', '"runs/push/me/cells"'), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, {})
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repo-id", "a/b/c"], "the rule is owner/name"),
        (["--repo-id", "me/cells", "--results", "none"], "results 'none' holds no metrics.json"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(tmp_path, capsys, arguments, message):
    best = make_run(tmp_path / "cells")
    assert main(["push", str(best), *arguments, "--dry-run", "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("drmm push: ") == 1 and message in error.strip().splitlines()[-1]
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("model", ["runs/none/best", "owner/cells", "cells"])
def test_a_model_that_is_no_folder_is_refused(tmp_path, monkeypatch, capsys, model):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "cells")
    assert main(["push", model, "--repo-id", "me/cells", "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert "does not exist" in error or "is it 'cells/best'" in error
    assert not (tmp_path / "runs").exists()


def test_another_detector_is_refused(model_folder, tmp_path, capsys):
    code = main(["push", str(model_folder), "--repo-id", "me/x", "--dry-run", "--output", str(tmp_path / "out")])
    is_drmm = json.loads((model_folder / "config.json").read_text())["model_type"] == "drmm"
    assert code == (0 if is_drmm else 2)
    assert is_drmm or "only D-RMM detectors are published" in capsys.readouterr().err


def test_two_at_once_in_one_folder(tmp_path, capsys, goes_on):
    best, lock = make_run(tmp_path / "cells"), tmp_path / "out" / "cells.lock"
    lock.mkdir(parents=True)
    command = ["push", str(best), "--repo-id", "me/cells", "--dry-run", "--output", str(tmp_path / "out" / "cells")]
    with goes_on(lock):
        assert main(command) == 2
        assert "in use by process 7" in capsys.readouterr().err
    assert main(command) == 0
