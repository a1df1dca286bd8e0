import json
import subprocess
import sys

import torch

from drmm_hf.data.generated import generate_shapes
from drmm_hf.training.manifest import add_to_manifest, data_changes, data_fingerprint, git_revision, versions


def test_each_start_adds_a_record(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/some/where/drmm", "train", "my recipe.yaml"])
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "manifest.json"
    add_to_manifest(path, step=0)
    add_to_manifest(path, step=7)
    records = json.loads(path.read_text())
    assert [record["step"] for record in records] == [0, 7]
    assert records[0]["command"] == "drmm train 'my recipe.yaml'"
    assert records[0]["working_directory"] == str(tmp_path)
    assert records[0]["git"] is None
    assert [file.name for file in tmp_path.iterdir()] == ["manifest.json"]


def test_versions_are_those_installed():
    found = versions()
    assert torch.__version__.startswith(found["torch"])
    assert found["python"] == sys.version.split()[0]


def test_the_revision_of_the_users_repository(tmp_path):
    assert git_revision(tmp_path) is None
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "file").write_text("one")
    for command in (["init", "-q"], ["add", "file"], ["commit", "-qm", "why"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, check=True, capture_output=True, text=True)
    (tmp_path / "other").write_text("not tracked")
    assert git_revision(tmp_path) == {"revision": head.stdout.strip(), "changed": False}
    (tmp_path / "file").write_text("two")
    assert git_revision(tmp_path)["changed"]


def test_a_fingerprint_depends_on_what_is_annotated_alone():
    shapes = generate_shapes(6, 3, (64, 64))
    fingerprint = data_fingerprint(shapes)
    objects = sum(len(row["objects"]) for row in shapes)
    assert (fingerprint["num_images"], fingerprint["num_objects"]) == (6, objects)
    assert data_fingerprint(generate_shapes(6, 3, (64, 64))) == fingerprint
    assert data_fingerprint(shapes.select(range(6))) == fingerprint
    assert data_fingerprint(shapes.select([1, 0, 2, 3, 4, 5]))["sha256"] != fingerprint["sha256"]
    other = shapes.map(lambda row: {"objects": [{**item, "iscrowd": 1} for item in row["objects"]]})
    assert data_fingerprint(other)["sha256"] != fingerprint["sha256"]


def test_data_are_compared_with_those_of_the_start_that_saved_the_checkpoint():
    """A start at the step of a checkpoint, which saved nothing itself, does not count."""
    old, new = ({"num_images": 2, "num_objects": 5, "sha256": name} for name in "ab")
    starts = [{"step": 0, "data": {"train": old, "val": old}}, {"step": 7, "data": {"train": old, "val": new}}]
    assert data_changes(starts, 7, {"train": old, "val": old}) == {}
    changes = data_changes(starts, 7, {"train": old, "val": new})
    words = "val data changed: 2 pictures with 5 objects as before, with other names, sizes, boxes or classes"
    assert changes == {"val": words}
    assert data_changes(starts, 9, {"train": old, "val": new}) == {}
    assert data_changes([], 9, {"train": old, "val": new}) == data_changes(starts, 0, {"train": new, "val": new}) == {}
    streams = [{"num_shards": shards, "sha256": str(shards)} for shards in (3, 4)]
    changes = data_changes([{"step": 0, "data": {"train": streams[0]}}], 1, {"train": streams[1], "val": new})
    assert changes == {"train": "train data changed: 3 shards before, 4 shards now"}
