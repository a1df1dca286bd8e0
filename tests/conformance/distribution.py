"""transformers' own common tests, fetched with the source distribution of the installed version."""

import importlib
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import transformers


CACHE = Path(__file__).parents[2] / "build" / "conformance"
PACKAGE = "transformers_tests"
# The distribution has the test files but not the folders beside them. What the common tests import from those: two
# mixins, left empty, keywords that only configs without sub-configs are tried with, a loader of pictures on the Hub.
LEFT_OUT = {
    f"{PACKAGE}.exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    f"{PACKAGE}.generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    f"{PACKAGE}.utils.test_configuration_utils": {"config_common_kwargs": {}},
    "fetch_hub_objects_for_ci": {"url_to_local_path": lambda url: url},
}


def download() -> Path:
    """Return the folder of the tests; fetch the distribution with pip, from whatever index pip is set to."""
    name = f"transformers-{transformers.__version__}"
    folder = CACHE / name / "tests"
    if not folder.exists():
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--no-binary",
            "transformers",
            "--dest",
            CACHE,
        ]
        subprocess.run([*command, name.replace("-", "==")], check=True, stdout=sys.stderr)
        with tarfile.open(CACHE / f"{name}.tar.gz") as archive:
            members = [member for member in archive if member.name.startswith(f"{name}/tests/")]
            archive.extractall(CACHE, members=members, filter="data")
        (folder / "utils").mkdir()
        (folder / "utils" / "tiny_model_summary.json").write_text("{}")  # of models on the Hub
    return folder


def load() -> None:
    """Make the tests importable as the package `transformers_tests`, with what the distribution left out."""
    packages = {PACKAGE} | {name.rpartition(".")[0] for name in LEFT_OUT if "." in name}
    for name in sorted(packages) + sorted(LEFT_OUT):
        module = ModuleType(name)
        module.__dict__.update(LEFT_OUT.get(name, {}))
        module.__path__ = [str(download())] if name == PACKAGE else []
        sys.modules[name] = module


def common(name: str) -> ModuleType:
    """Import a file of common tests, such as "test_modeling_common"."""
    if PACKAGE not in sys.modules:
        load()
    # They mean the checkout they lie in; here it is the installed package.
    with patch("transformers.utils.direct_transformers_import", return_value=transformers):
        return importlib.import_module(f"{PACKAGE}.{name}")
