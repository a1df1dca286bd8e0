import argparse
import json
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from huggingface_hub.errors import StrictDataclassError

import drmm_cli as cli
import drmm_hf
from drmm_hf.commands import benchmark
from drmm_hf.commands.document import add_json


@pytest.fixture
def stub(monkeypatch):
    """Replace the command modules by one that runs a given function."""

    class Module:
        @staticmethod
        def add_arguments(parser):
            parser.add_argument("path")

        @staticmethod
        def run(args):
            raise NotImplementedError

    monkeypatch.setattr(cli, "import_module", lambda name: Module)
    return Module


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in cli.COMMANDS)


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_every_command_shows_an_example(stub, capsys, command):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    assert f"example: drmm {command} " in " ".join(capsys.readouterr().out.split())


def test_the_version_is_the_package_s(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"drmm-hf {drmm_hf.__version__}\n"


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError, ConnectionError, StrictDataclassError])
def test_a_wrong_value_is_said_in_one_line(stub, capsys, error):
    def run(args):
        raise error("value is 3:\n  must be 4")

    stub.run = run
    assert cli.main(["predict", "x"]) == 2
    assert capsys.readouterr().err == "drmm predict: value is 3: must be 4\n"
    with pytest.raises(error):
        cli.main(["predict", "x", "--debug"])


def test_a_defect_is_named_and_shows_its_traceback_when_asked_to(stub, capsys):
    def run(args):
        raise RuntimeError("a\ndefect")

    stub.run = run
    assert cli.main(["predict", "x"]) == 1
    assert capsys.readouterr().err == "drmm predict: RuntimeError: a defect (--debug shows where it comes from)\n"
    with pytest.raises(RuntimeError):
        cli.main(["predict", "x", "--debug"])


def test_a_defect_leaves_its_traceback_in_the_output_folder(stub, tmp_path, monkeypatch, capsys):
    """Where there is one by then, for each process, and not of wrong values."""
    error, folder = RuntimeError("a\ndefect"), tmp_path / "out"

    def run(args):
        args.output = str(folder)
        raise error

    stub.run = run
    assert cli.main(["predict", "x"]) == 1 and not folder.exists()
    assert "(--debug shows where it comes from)" in capsys.readouterr().err
    folder.mkdir()
    for name, rank in (("traceback.txt", None), ("traceback-3.txt", "3")):
        monkeypatch.delenv("RANK", raising=False) if rank is None else monkeypatch.setenv("RANK", rank)
        assert cli.main(["predict", "x"]) == 1
        said = f"drmm predict: RuntimeError: a defect ({folder / name} has where it comes from)\n"
        assert capsys.readouterr().err == said
        text = (folder / name).read_text()
        assert text.startswith("Traceback") and "raise error" in text and text.endswith("RuntimeError: a\ndefect\n")
    error = ValueError("wrong")
    assert cli.main(["predict", "x"]) == 2 and len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("document", [{"AP": 0.5}, [], None])
def test_json_is_all_of_standard_output(stub, capfd, document):
    """What the command and its libraries print for people goes to standard error; some processes have no document."""

    def add_arguments(parser):
        add_json(parser)

    def run(args):
        print("for people")
        args.document = document
        return 3

    stub.add_arguments, stub.run = staticmethod(add_arguments), run
    assert cli.main(["predict", "--json"]) == 3
    shown = capfd.readouterr()
    assert shown.err == "for people\n"
    assert (json.loads(shown.out) if shown.out else None) == document
    assert cli.main(["predict"]) == 3
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("for people\n", "")


@pytest.mark.parametrize("on_terminal", [True, False])
def test_colours_are_for_terminals(stub, monkeypatch, capsys, on_terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: on_terminal)
    stub.run = lambda args: print("\x1b[1mloud\x1b[0m and clear", file=sys.stderr) or 0
    assert cli.main(["predict", "x"]) == 0
    assert capsys.readouterr().err == ("\x1b[1mloud\x1b[0m and clear\n" if on_terminal else "loud and clear\n")


def test_libraries_draw_no_bars_where_nobody_sees_them(stub, monkeypatch):
    names = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")
    monkeypatch.setattr(cli.os, "environ", {names[1]: "0"})
    stub.run = lambda args: 0
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    cli.main(["predict", "x"])
    assert cli.os.environ == {names[1]: "0"}
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    cli.main(["predict", "x"])
    assert cli.os.environ == {names[0]: "1", names[1]: "0"}  # unless they are asked for


def test_the_result_of_the_command_is_the_exit_code(stub):
    stub.run = lambda args: 7 if args.path == "x" else 0
    assert cli.main(["predict", "x"]) == 7
    assert cli.main(["predict", "y"]) == 0


@pytest.mark.parametrize("argv", [[], ["trane"], ["predict", "x", "--unknown", "3"], ["predict"]])
def test_wrong_arguments_exit_with_2(stub, capsys, argv):
    with pytest.raises(SystemExit) as exit_:
        cli.main(argv)
    assert exit_.value.code == 2
    assert "usage: drmm" in capsys.readouterr().err


def test_the_command_line_itself_needs_only_the_standard_library():
    """`drmm --help` must not wait for torch: run the file alone and see what it imported."""
    program = (
        f"import runpy, sys; main = runpy.run_path({cli.__file__!r})['main']\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'numpy', 'drmm_hf'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_examples_are_understood():
    for command, (_, example) in cli.COMMANDS.items():
        parser = argparse.ArgumentParser()
        module = import_module(f"drmm_hf.commands.{command}")
        module.add_arguments(parser)
        assert example.startswith(f"drmm {command} ")
        args, rest = parser.parse_known_args(shlex.split(example)[2:])
        assert not rest or hasattr(args, "fields")
    for kind, words in benchmark.EXAMPLES.items():
        parser = argparse.ArgumentParser()
        benchmark.add_arguments(parser)
        assert parser.parse_args([kind, *shlex.split(words)]).kind == kind


def test_recipes_in_examples_exist():
    root = Path(__file__).parents[1]
    examples = [*(example for _, example in cli.COMMANDS.values()), *benchmark.EXAMPLES.values()]
    recipes = [word for example in examples for word in example.split() if word.startswith("scripts/")]
    assert recipes
    assert [recipe for recipe in recipes if not (root / recipe).is_file()] == []


@pytest.mark.parametrize(
    ("error", "code"),
    [(KeyboardInterrupt(), 130), (FloatingPointError("loss is not finite"), 1)],
    ids=["ctrl-c", "nan"],
)
def test_interruptions_and_diverged_losses_are_said_in_one_line(stub, capsys, error, code):
    def run(args):
        raise error

    stub.run = run
    assert cli.main(["predict", "x"]) == code
    assert capsys.readouterr().err.startswith("drmm predict: ")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_the_work_is_done_when_nobody_reads_to_the_end(stream, tmp_path):
    program = (
        "import sys, types, drmm_cli\n"
        "def run(args):\n"
        f"    for number in range(50000): print('line', number, file=sys.{stream})\n"
        "    open(args.path, 'w').write('done')\n"
        f"    print('last', file=sys.{stream}, flush=True)\n"
        "    return 0\n"
        "add = lambda parser: parser.add_argument('path')\n"
        "drmm_cli.import_module = lambda name: types.SimpleNamespace(add_arguments=add, run=run)\n"
        f"sys.exit(drmm_cli.main(['predict', {str(tmp_path / 'file')!r}]))\n"
    )
    streams = {name: subprocess.PIPE for name in ("stdout", "stderr")}
    process = subprocess.Popen([sys.executable, "-c", program], cwd=Path(cli.__file__).parent, **streams)
    reader = getattr(process, stream)
    assert reader.readline().split() == [b"line", b"0"]
    reader.close()
    other = process.stderr if stream == "stdout" else process.stdout
    assert other.read() == b"" and process.wait() == 0
    assert (tmp_path / "file").read_text() == "done"
    other.close()
