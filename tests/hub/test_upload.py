"""The way to the Hub, against a stand-in: what reaches the wire, and what each refusal says."""

import json

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import LocalEntryNotFoundError

from conftest import tiny_config
from drmm_hf import DrmmImageProcessor
from drmm_hf.hub.card import Subject, write_card
from drmm_hf.hub.upload import check_name, upload
from hub_stand_in import READER, Repo


CARD = write_card(Subject("me/cells", tiny_config(), DrmmImageProcessor(), 1, {}))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "cells"
    (folder / "results").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"\0" * 5000)
    (folder / "results" / "metrics.json").write_text('{"AP": 0.5}')
    return folder


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_all_files_go_in_one_commit(hub, folder):
    address = upload(folder, "me/cells", message="First")
    (commit,) = hub.commits
    assert commit.files == files(folder) == hub.repos["me/cells"].branches["main"]
    assert (commit.repo_id, commit.revision, commit.message, commit.create_pr) == ("me/cells", "main", "First", False)
    assert address.startswith(f"{hub.endpoint}/me/cells/commit/") and not hub.repos["me/cells"].private
    assert hub.large_files  # weights take the way of large files


def test_files_that_are_there_already_stay(hub, folder):
    hub.repos["me/cells"] = Repo(branches={"main": {"mine.png": b"1", "config.json": b"old"}})
    upload(folder, "me/cells")
    assert hub.repos["me/cells"].branches["main"] == {"mine.png": b"1"} | files(folder)


def test_private_reaches_the_wire(hub, folder):
    upload(folder, "me/cells", private=True)
    assert hub.repos["me/cells"].private


def test_private_is_not_quietly_public(hub, folder):
    hub.repos["me/cells"] = Repo(private=False)
    with pytest.raises(ValueError, match="everybody can see it"):
        upload(folder, "me/cells", private=True)
    assert not hub.commits
    hub.repos["me/cells"].private = True
    upload(folder, "me/cells", private=True)
    assert len(hub.commits) == 1


def test_a_pull_request_reaches_the_wire(hub, folder, monkeypatch):
    hub.repos["other/cells"] = Repo(branches={"main": {"README.md": b"# theirs"}})
    monkeypatch.setenv("HF_TOKEN", READER)
    address = upload(folder, "other/cells", create_pr=True)
    (commit,) = hub.commits
    assert commit.create_pr and commit.files == files(folder) and address.endswith("/discussions/1")
    assert hub.repos["other/cells"].branches["main"] == {"README.md": b"# theirs"}


def test_a_branch_reaches_the_wire_and_is_made(hub, folder):
    upload(folder, "me/cells", revision="v2")
    upload(folder, "me/cells", revision="v2")
    assert [commit.revision for commit in hub.commits] == ["v2", "v2"]
    branches = hub.repos["me/cells"].branches
    assert branches["v2"] == files(folder) and branches["main"] == {}


@pytest.mark.parametrize("card", ["# mine\n", CARD.replace("# cells", "# Cells")])
@pytest.mark.parametrize("revision", [None, "v2"])
def test_a_card_that_was_edited_on_the_hub_is_not_lost(hub, folder, card, revision):
    hub.repos["me/cells"] = Repo(branches={"main": {}, revision or "main": {"README.md": card.encode()}})
    with pytest.raises(ValueError, match="--replace-card"):
        upload(folder, "me/cells", revision=revision)
    assert not hub.commits
    upload(folder, "me/cells", revision=revision, create_pr=True)
    assert hub.commits.pop().create_pr
    upload(folder, "me/cells", revision=revision, replace_card=True)
    assert hub.repos["me/cells"].branches[revision or "main"]["README.md"] == CARD.encode()


def test_a_card_of_ours_and_the_same_card_are_replaced(hub, folder):
    other = write_card(Subject("me/other", tiny_config(), DrmmImageProcessor(), 2, {}))
    hub.repos["me/cells"] = Repo(branches={"main": {"README.md": other.encode()}})
    upload(folder, "me/cells")
    (folder / "README.md").write_text("# mine\n")
    hub.repos["me/cells"].branches["main"]["README.md"] = b"# mine\n"
    upload(folder, "me/cells")
    assert len(hub.commits) == 2


@pytest.mark.parametrize(
    ("repo_id", "options", "token", "message"),
    [
        ("me/cells", {}, "hf_wrong", "does not know this token: run `hf auth login`"),
        ("me/cells", {}, READER, "may not write to me/cells"),
        ("other/cells", {}, None, "may not write to other/cells"),
        ("other/none", {"create_pr": True}, None, "may not write to other/none"),
        ("me/cells", {"create_pr": True, "revision": "v9"}, None, "has no branch 'v9'"),
    ],
)
def test_refusals_say_what_to_do(hub, folder, monkeypatch, repo_id, options, token, message):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(OSError, match=message) as error:
        upload(folder, repo_id, **options)
    assert "\n" not in str(error.value) and not hub.commits


def test_a_repository_that_vanishes_is_named(hub, folder, monkeypatch):
    monkeypatch.setattr(type(hub), "create", lambda self, handler, body, query: handler.answer(409, {"url": "x/y/z"}))
    routes = {name: action for name, action in hub.ROUTES.items() if "create" not in name}
    hub.ROUTES = {"POST /api/repos/create": type(hub).create} | routes
    with pytest.raises(OSError, match="the Hub has no"):
        upload(folder, "me/cells")


def test_a_failing_hub_is_named(hub, folder):
    def fail(self, handler, *_, **__):
        handler.answer(418, {"error": "a teapot"})

    hub.ROUTES = {"POST /api/repos/create": fail}
    with pytest.raises(OSError, match="the Hub answers 418: .*teapot"):
        upload(folder, "me/cells")


def test_a_card_that_cannot_be_read_is_not_taken_for_none(hub, folder, monkeypatch):
    """huggingface_hub's error of a broken connection is a kind of "no such entry"."""

    def broken(*_, **__):
        raise LocalEntryNotFoundError("the connection broke, and nothing is in the cache")

    monkeypatch.setattr(HfApi, "hf_hub_download", broken)
    with pytest.raises(OSError, match="cannot be reached: the connection broke"):
        upload(folder, "me/cells")
    assert not hub.commits


def test_a_hub_out_of_reach_is_one_line(hub, folder, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OSError, match="http://127.0.0.1:9 cannot be reached"):
        upload(folder, "me/cells")


def test_without_a_token_or_offline_nothing_is_asked(hub, folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="HF_HUB_OFFLINE is set"):
        upload(folder, "me/cells")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "nowhere")
    with pytest.raises(ValueError, match="hf auth login"):
        upload(folder, "me/cells")
    assert not hub.requests


@pytest.mark.parametrize(
    "name", ["a/b/c", "", "-x", "me/cells.git", "me/a--b", "me/ü", "me/" + "x" * 97, "./x", "a b", "cells"]
)
def test_malformed_names_are_refused(name):
    with pytest.raises(ValueError, match="the rule is owner/name"):
        check_name(name)
    assert check_name("me/cells") == "me/cells"


def test_the_stand_in_understands_the_hub_s_commits(hub, folder):
    upload(folder, "cells")
    asked = [json.dumps(request) for request in hub.requests]
    assert [commit.repo_id for commit in hub.commits] == ["me/cells"] and any("preupload" in one for one in asked)
