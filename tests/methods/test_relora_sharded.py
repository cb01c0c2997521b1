"""ReLoRA with rows spread over two processes (FSDP 2) trains what one process does, over merges (relora_worker.py)."""

import json

import pytest
from relora_worker import CASES


@pytest.fixture(scope="module")
def two_processes(launcher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    launcher("relora_worker", folder, processes=2)
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_what_one_does_over_merges(case, two_processes):
    found = two_processes[case]
    assert found["restarts"] == 3
    assert found["log"]
    for what in ("weights and moments", "dense form", "norms"):
        assert found[what] < 1e-6, (what, found[what])
