"""Count what the common tests say of each class; list what did not run or is excluded, with the reason."""

import re
from collections import Counter, defaultdict

import pytest

from conformance.exclusions import EXCLUSIONS


OUTCOMES = ("passed", "failed", "excluded", "skipped")
reports = defaultdict(list)


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore::pytest.PytestUnknownMarkWarning")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.name != "test_peers.py" and item.name in EXCLUSIONS:
            item.add_marker(pytest.mark.xfail(strict=True, reason=EXCLUSIONS[item.name]))


def pytest_runtest_logreport(report):
    if report.when == "call" or not report.passed:
        reports[report.nodeid].append(report)


def outcome(reports) -> str:
    """Tell what became of a test; a subtest that failed or was skipped counts for the whole."""
    found = {"excluded" if hasattr(report, "wasxfail") else report.outcome for report in reports}
    return next(name for name in ("failed", "excluded", "skipped", "passed") if name in found)


def skip_reason(report) -> str:
    """Say why, without the names of the class and of the test."""
    reason = report.longrepr[2].removeprefix("Skipped: ").rpartition(" is skipped: ")[2]
    reason = re.sub(r"^`[\w-]+` is not in .*", "the task is not the model's", reason)
    return re.sub(r"<class '[\w.]+'>", "the model", reason)


def pytest_terminal_summary(terminalreporter):
    write, counts, reasons = terminalreporter.write_line, defaultdict(Counter), defaultdict(set)
    for nodeid, of_test in reports.items():
        _, class_name, test = nodeid.split("::")
        counts[class_name][outcome(of_test)] += 1
        for report in of_test:
            if report.skipped and not hasattr(report, "wasxfail"):
                reasons[skip_reason(report)].add(test)
    terminalreporter.section("transformers' common tests")
    write(f"{'':26}" + "".join(f"{name:>10}" for name in OUTCOMES))
    for class_name, count in [*counts.items(), ("together", sum(counts.values(), Counter()))]:
        write(f"{class_name.removeprefix('Test'):26}" + "".join(f"{count[name]:10}" for name in OUTCOMES))
    if any(count["excluded"] for count in counts.values()):
        write("\nexcluded: run, and known to fail")
        for test, reason in EXCLUSIONS.items():
            write(f"  {test}: {reason}")
    write("\nskipped by the tests themselves")
    for reason, tests in sorted(reasons.items(), key=lambda entry: -len(entry[1])):
        write(f"  {len(tests):3}  {reason}: {', '.join(sorted(tests)[:3])}{', ...' if len(tests) > 3 else ''}")
