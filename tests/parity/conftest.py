"""Tells `golden` whose case is being compared; `$ESPER_PARITY_REPORT` names a file for the largest error of each."""

import os
import pathlib

import golden
import pytest


@pytest.fixture(autouse=True)
def _compared_case(request):
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    golden.compared_case = parameters.get("case")


def pytest_terminal_summary(terminalreporter):
    path = os.environ.get("ESPER_PARITY_REPORT")
    if path:
        pathlib.Path(path).write_text(golden.report())
        terminalreporter.write_line(f"largest errors of all golden cases: {path}")
