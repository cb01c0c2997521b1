"""The same numbers whatever the number of processes, with DDP and FSDP2 (see metrics_worker.py)."""

import json

import pytest


@pytest.mark.slow
def test_metrics_do_not_depend_on_the_processes(launcher, tmp_path):
    for processes in (1, 2):
        launcher("metrics_worker", tmp_path, processes=processes)
    results = json.loads((tmp_path / "metrics-2.json").read_text())
    assert len(results) > 300
    assert {case: error for case, error in results.items() if not error < 1e-6} == {}
