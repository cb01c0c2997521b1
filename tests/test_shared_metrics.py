"""The same numbers whatever the number of processes, with DDP and FSDP2 (see metrics_worker.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.slow
def test_metrics_do_not_depend_on_the_processes(tmp_path):
    for processes in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        done = subprocess.run(
            [*command, str(TESTS / "metrics_worker.py"), str(tmp_path)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "metrics-2.json").read_text())
    assert len(results) > 300
    assert {case: error for case, error in results.items() if not error < 1e-6} == {}
