"""Every method, killed with SIGKILL at the worst moments, goes on bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import METHODS, projected, restarted

TESTS = Path(__file__).parent


@pytest.mark.slow
def test_every_method_killed_anywhere_ends_as_if_it_never_was(tmp_path):
    done = subprocess.run(
        [sys.executable, str(TESTS / "killed_worker.py"), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "killed.json").read_text())
    assert {case: found for case, found in results.items() if found} == {}
    assert {case.partition(" ")[0] for case in results} == set(METHODS)
    for method, config in METHODS.items():
        points = {"in the backward pass", "in a save"}
        points |= {"in a refresh", "in an update"} if projected(config) else set()
        points |= {"in a merge"} if restarted(config) else set()
        assert {case.partition(" ")[2] for case in results if case.partition(" ")[0] == method} == points, method
