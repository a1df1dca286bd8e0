"""Tell the folder of a model from its id on the Hub before the Hub is asked, which may take half a minute."""

import json
import os
import re
from pathlib import Path

from huggingface_hub.utils import HFValidationError, validate_repo_id


# An id may have dots, as timm's do, but none ends like a file.
_FILE_SUFFIX = re.compile(r"\.(safetensors|pth?|bin|ckpt|pkl|onnx|json|ya?ml|zip|tar|t?gz)$", re.IGNORECASE)


def find_source(source: str | Path, argument: str = "model") -> str:
    """Return the folder that a name means, or the name itself where only the Hub can know it.

    A folder that exists is meant, whatever its name; it must hold a model. Of other names, `name` and `owner/name` are
    ids on the Hub; a path is what the Hub allows as no id ("./mine", "~/mine", "runs/mine/best", "/runs"), what ends
    like a file, and what starts with a folder that exists ("runs/mine" beside "runs").

    Args:
        source (`str` or `Path`): folder, or id on the Hub. "~" is the home folder.
        argument (`str`): its name in messages.

    Returns:
        `str`: an existing folder, or `source`.

    Raises:
        FileNotFoundError: if it is a path and does not exist, or a folder without `config.json`.
        NotADirectoryError: if it is a file.
        ValueError: if its `config.json` holds no object.
    """
    source = str(source)
    path = Path(os.path.expanduser(source))  # Path's own expanduser fails where there is no such home
    if source and path.is_dir():
        if not (path / "config.json").is_file():
            inside = sorted(str(file.parent) for file in path.glob("*/config.json"))
            hint = f"; is it {' or '.join(map(repr, inside[:3]))}?" if inside else "."
            raise FileNotFoundError(f"{argument} {source!r} holds no config.json, as a folder of a model does{hint}")
        _check_config(path / "config.json")
        return str(path)
    if path.is_file():
        raise NotADirectoryError(f"{argument} {source!r} is a file; give the folder that holds the model.")
    reason = None
    try:
        validate_repo_id(source)
    except HFValidationError:
        reason = "and no id on the Hub looks like this"
    else:
        if _FILE_SUFFIX.search(source):
            reason = "and no id on the Hub ends like a file"
        elif path.parent != Path() and path.parent.is_dir():
            reason = f"but {str(path.parent)!r} does, and so the Hub was not asked"
    if reason is not None:
        raise FileNotFoundError(f"{argument} {source!r} does not exist, {reason}.")
    return source


def _check_config(path: Path) -> None:
    """Refuse what transformers stumbles over without naming it; what is no json at all it names."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {json.dumps(content)[:40]}; the rule is an object with a model_type.")
