"""Several processes against one: DDP through Trainer, FSDP2 through `fully_shard`, resuming at another world size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sharded_worker
from tiny_runs import METHODS

TESTS = Path(__file__).parent


def launch(folder, part, processes):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [*command, str(TESTS / "sharded_worker.py"), str(folder), part],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / f"{part}-{processes}.json").read_text())


def tolerance(case):
    if case.startswith("muon, float32"):
        # the iteration runs in bf16, where another order of summation turns a last bit of 2^-8
        return 0.1
    # the order of summation alone, amplified by Adam where a gradient is near zero
    return 1e-3 if "float32" in case else 1e-6


def apart(results):
    """The cases whose error is not within their tolerance."""
    # rounding may turn the signs of a factor's row and column at a refactorisation: float64 shows that all is equal
    compared = {case: error for case, error in results.items() if case != "lowrank, float32"}
    return {case: error for case, error in compared.items() if not error < tolerance(case)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the launches leave what the next ones go on from."""
    return tmp_path_factory.mktemp("sharded")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_sharded_matrices_are_stepped_as_whole_ones(processes, folder):
    # with 4 processes most of these matrices leave some process without a row
    results = launch(folder, "matrices", processes)
    hybrid = len(sharded_worker.HYBRID_CASES)
    assert len(results) == 2 * len(sharded_worker.MATRIX_CASES) + hybrid * (1 + (processes == 4))
    assert {case: error for case, error in results.items() if not error < 1e-6} == {}


@pytest.mark.slow
def test_every_method_sharded_equals_one_process_and_resumes_at_another_world_size(folder):
    results = launch(folder, "methods", 2)
    assert len(results) == 4 * len(METHODS)
    assert apart(results) == {}
    for processes in (1, 4):
        results = launch(folder, "resume", processes)
        assert set(results) == set(METHODS)
        assert {case: error for case, error in results.items() if not error < 1e-6} == {}


@pytest.mark.slow
def test_a_sharded_model_is_measured_and_published_as_a_whole_one(folder):
    results = launch(folder, "publish", 2)
    assert len(results) == 2 * len(METHODS)
    assert {case: error for case, error in results.items() if not error < 1e-3} == {}


@pytest.mark.slow
def test_every_method_with_ddp_equals_one_process(folder):
    launch(folder, "ddp", 1)
    results = launch(folder, "ddp", 2)
    shares = {case: results.pop(case) for case in list(results) if case.endswith("share of the refreshes")}
    # the dearest matrices of the two layers are a square of 24 and three of 24 x 27: the shares are about equal
    assert shares
    assert {case: share for case, share in shares.items() if not 0.5 <= share <= 0.6} == {}
    dealt = [results.pop(case) for case in list(results) if case.startswith("dealt refreshes")]
    assert dealt == [0, 0, 0]
    assert len(results) == 2 * len(METHODS)
    assert apart(results) == {}


@pytest.mark.slow
def test_architectures_with_other_names_on_disk_and_experts_resume_and_are_published(folder):
    results = launch(folder, "converted", 2)
    assert len(results) == 12
    assert {case: error for case, error in results.items() if not error < 1e-6} == {}
    assert {error for case, error in results.items() if case.endswith("DDP")} == {0}


@pytest.mark.slow
def test_layers_that_are_read_have_the_gradients_of_one_process(folder):
    results = launch(folder, "uncalled", 2)
    assert len(results) == 6
    # gradients of up to 5, summed in another order
    assert {case: error for case, error in results.items() if not error < 1e-5} == {}
