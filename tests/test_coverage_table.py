import json
import runpy
import sys
from pathlib import Path


SCRIPT = Path(__file__).parents[1] / "scripts" / "coverage_table.py"


def measured(statements, covered):
    return {"summary": {"num_statements": statements, "covered_lines": covered}}


def test_lines_are_added_up_by_room(tmp_path, monkeypatch, capsys):
    files = {
        "src/drmm_hf/data/coco.py": measured(10, 10),
        "src/drmm_hf/data/labels.py": measured(30, 20),
        "src/drmm_hf/hub/__init__.py": measured(0, 0),
        "src/drmm_hf/modeling/boxes.py": measured(10, 1),
        "src/drmm_cli.py": measured(50, 50),
    }
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"files": files}))
    monkeypatch.setattr(sys, "argv", ["coverage_table.py", str(report)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["room", "lines", "run", "%"],
        ["modeling", "10", "1", "10.0"],
        ["data", "40", "30", "75.0"],
        ["drmm_cli.py", "50", "50", "100.0"],
        ["all", "100", "81", "81.0"],
    ]
