"""Bring a folder to the Hub, or say in one line why it cannot be brought there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .card import is_untouched
from .places import may_be_repo_id


def check_name(repo_id: str) -> str:
    """Refuse what the Hub takes as no name of a repository.

    Args:
        repo_id (`str`): "owner/name"; the card has to name the owner, too.

    Returns:
        `str`: The name.

    Raises:
        ValueError: If it is malformed.
    """
    if not may_be_repo_id(repo_id):
        raise ValueError(
            f"repo-id is {repo_id!r}; the rule is owner/name of letters, digits, '-', '_' and '.', at most 96, "
            "without '--' and '..', and not beginning or ending with '-' or '.'."
        )
    return repo_id


def check_access() -> None:
    """Refuse what cannot end in an upload, before the work.

    Raises:
        ValueError: If there is no token.
        OSError: If the Hub is not to be asked.
    """
    if constants.is_offline_mode():
        raise OSError("the Hub is not asked: HF_HUB_OFFLINE is set. Unset it, or pass --dry-run")
    if get_token() is None:
        raise ValueError("there is no token of the Hub: run `hf auth login`, or set HF_TOKEN to one that may write")


def upload(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
    replace_card: bool = False,
    message: str = "Upload a D-RMM detector",
) -> str:
    """Upload all files of a folder in one commit. Other files of the repository stay.

    Args:
        folder (`str` or `Path`): From `drmm_hf.hub.publication.prepare`.
        repo_id (`str`): The repository; made if it does not exist.
        private (`bool`): Whether only its owners may see it.
        create_pr (`bool`): Whether to propose the files in a pull request.
        revision (`str`, *optional*): Branch; made from the main one if it does not exist.
        replace_card (`bool`): Whether to replace a card that was edited on the Hub.
        message (`str`): Of the commit.

    Returns:
        `str`: Address of the pull request or the commit.

    Raises:
        ValueError: If there is no token, if the repository would be seen by others than was asked, or if its card was
            edited.
        OSError: If the Hub refuses, or cannot be reached.
    """
    check_access()
    api = HfApi(library_name="drmm-hf")
    with _said_plainly(repo_id, revision):
        repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        if private and not api.repo_info(repo_id).private:
            raise ValueError(
                f"--private, but {repo_id} exists and everybody can see it: make it private in its settings, or name "
                "another repository"
            )
        if not create_pr and not replace_card:
            _check_card(api, folder, repo_id, revision)
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        files = (path for path in sorted(Path(folder).rglob("*")) if path.is_file())
        added = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]
        options: dict[str, Any] = {"revision": revision, "create_pr": create_pr, "commit_message": message}
        commit = api.create_commit(repo_id, added, **options)
    return commit.pr_url or commit.commit_url


def _check_card(api: HfApi, folder: str | Path, repo_id: str, revision: str | None) -> None:
    """Refuse to lose what somebody has written on the Hub."""
    with TemporaryDirectory() as aside:
        try:
            path = api.hf_hub_download(repo_id, "README.md", revision=revision, local_dir=aside)
        except (RemoteEntryNotFoundError, RevisionNotFoundError):
            return
        card = Path(path).read_text(encoding="utf-8")
    if not is_untouched(card) and card != (Path(folder) / "README.md").read_text(encoding="utf-8"):
        raise ValueError(
            f"the card of {repo_id} was not written by drmm push, or edited since, and would be lost: save it as "
            "README.md in the model folder to publish it, or pass --create-pr, or --replace-card"
        )


@contextmanager
def _said_plainly(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn errors of the Hub into lines that say what to do."""
    try:
        yield
    except OfflineModeIsEnabled:
        raise
    except RevisionNotFoundError as error:
        raise OSError(f"{repo_id} has no branch {revision!r}; make it first, or leave out --create-pr") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401 and not isinstance(error, RepositoryNotFoundError):
            text = "the Hub does not know this token: run `hf auth login`, or set HF_TOKEN to a valid one"
        elif status == 403:
            text = (
                f"this token may not write to {repo_id}: use one with the right to write, name a repository of yours, "
                "or propose the files with --create-pr"
            )
        elif isinstance(error, RepositoryNotFoundError) or status == 404:
            text = f"the Hub has no {repo_id} that this token can see: check the name and the token"
        else:
            text = f"the Hub answers {status}: {error.server_message or error}"
        raise OSError(text) from error
    except Exception as error:
        # Of the transport, whose package depends on the version of huggingface_hub.
        packages = ("httpx", "httpx2", "httpcore", "requests")
        if not isinstance(error, LocalEntryNotFoundError) and type(error).__module__.split(".")[0] not in packages:
            raise
        raise OSError(f"{constants.ENDPOINT} cannot be reached: {error}. Nothing is lost; try again") from error
