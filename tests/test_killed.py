"""Every method, killed with SIGKILL at the worst moments, goes on bit for bit."""

import json

import pytest
from tiny_runs import METHODS, projected, restarted


@pytest.mark.slow
def test_every_method_killed_anywhere_ends_as_if_it_never_was(launcher, tmp_path):
    launcher("killed_worker", tmp_path)
    results = json.loads((tmp_path / "killed.json").read_text())
    assert {case: found for case, found in results.items() if found} == {}
    assert {case.partition(" ")[0] for case in results} == set(METHODS)
    for method, config in METHODS.items():
        points = {"in the backward pass", "in a save"}
        points |= {"in a refresh", "in an update"} if projected(config) else set()
        points |= {"in a merge"} if restarted(config) else set()
        assert {case.partition(" ")[2] for case in results if case.partition(" ")[0] == method} == points, method
