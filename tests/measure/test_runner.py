"""The runner's rules on small units in forked processes: who does what, and what a death costs."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from hf_lowrank.measure.progress import Failure, Progress
from hf_lowrank.measure.runner import LOCK, Job, Work, run_jobs

UNITS = 12


class Line(Work):
    """A unit that writes a line into `<folder>/<number>` and notes in `<folder>/log` which process was at it."""

    def __init__(self, folder, number, seconds=0.08, dies_in=None, fails=False):
        self.folder, self.number, self.seconds, self.dies_in, self.fails = folder, number, seconds, dies_in, fails
        self.key, self.where, self.name = f"{folder}/{number}", folder.name, f"unit {number}"

    def is_done(self):
        return (self.folder / str(self.number)).is_file()

    def do(self, tick):
        with (self.folder / "log").open("a") as log:
            log.write(json.dumps([self.number, os.environ.get("RANK", "0")]) + "\n")
        time.sleep(self.seconds)
        if self.dies_in is not None and self.dies_in == os.environ["RANK"]:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fails:
            raise RuntimeError("broken")
        return f"line {self.number}"

    def keep(self, result):
        (self.folder / str(self.number)).write_text(result)
        # what a write that is not alone would lose
        held = self.folder / "all"
        numbers = json.loads(held.read_text()) if held.is_file() else []
        time.sleep(0.005)
        held.write_text(json.dumps([*numbers, self.number]))

    def fail(self, error):
        return Failure(self.where, self.name, str(error))


class Said(Progress):
    """What a process is told, by line."""

    def __init__(self):
        self.failures, self.begun, self.skipped = [], [], []

    def unit(self, where, name, done):
        (self.skipped if done else self.begun).append(name)

    def failed(self, failure):
        self.failures.append(failure.name)


def work(folder, units, rank, world, begin):
    """What each process of a launch does; its results go to `<folder>/said-<rank>`."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    said = Said()
    begin.wait(60)
    failures = run_jobs([Job(units, lambda: report(folder))], folder / LOCK, said)
    results = {"failures": [f.name for f in failures], "told": said.failures, "begun": said.begun}
    (folder / f"said-{rank}").write_text(json.dumps(results))


def report(folder):
    written = sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    (folder / f"report-{os.environ.get('RANK', '0')}").write_text(json.dumps(written))


def launch(folder, units, world=2):
    """The exit codes of a launch's processes, and what each was told."""
    fork = multiprocessing.get_context("fork")
    begin = fork.Barrier(world)
    processes = [fork.Process(target=work, args=(folder, units, rank, world, begin)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    said = {rank: folder / f"said-{rank}" for rank in range(world)}
    return [p.exitcode for p in processes], {r: json.loads(p.read_text()) for r, p in said.items() if p.is_file()}


def done_by(folder):
    """Unit -> the processes that did it."""
    by = {}
    for line in (folder / "log").read_text().splitlines():
        number, rank = json.loads(line)
        by.setdefault(number, []).append(rank)
    return by


def read(path: Path):
    return json.loads(path.read_text())


@pytest.mark.parametrize("world", [2, 3])
def test_every_unit_is_done_by_one_process_and_all_processes_work(world, tmp_path):
    codes, _ = launch(tmp_path, [Line(tmp_path, n) for n in range(UNITS)], world)
    assert codes == [0] * world
    by = done_by(tmp_path)
    assert sorted(by) == list(range(UNITS))
    assert all(len(ranks) == 1 for ranks in by.values())
    assert {ranks[0] for ranks in by.values()} == {str(rank) for rank in range(world)}
    assert sorted(read(tmp_path / "all")) == list(range(UNITS)), "no write was lost"
    # neighbours, which need the same model, go to the same process
    assert by[0] == ["0"]
    assert by[UNITS * (world - 1) // world] == [str(world - 1)]


def test_the_first_process_alone_reports_when_all_is_done(tmp_path):
    launch(tmp_path, [Line(tmp_path, n, seconds=0.4 if n == UNITS - 1 else 0.02) for n in range(UNITS)])
    assert read(tmp_path / "report-0") == list(range(UNITS))
    assert not (tmp_path / "report-1").exists()
    assert not (tmp_path / LOCK).exists()


def test_units_of_unequal_cost_are_shared(tmp_path):
    # the first half is as cheap as it gets: its process helps with the other half
    launch(tmp_path, [Line(tmp_path, n, seconds=0.2 if n >= UNITS // 2 else 0) for n in range(UNITS)])
    dear = [ranks[0] for number, ranks in done_by(tmp_path).items() if number >= UNITS // 2]
    assert min(dear.count("0"), dear.count("1")) >= 2


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_loses_the_unit_it_was_at_and_the_other_takes_it(rank, tmp_path):
    at = {0: 2, 1: UNITS // 2 + 2}[rank]
    units = [Line(tmp_path, n, dies_in=str(rank) if n == at else None) for n in range(UNITS)]
    codes, said = launch(tmp_path, units)
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] == 0
    assert list(said) == [1 - rank]
    by = done_by(tmp_path)
    assert by.pop(at) == [str(rank), str(1 - rank)]
    assert all(len(ranks) == 1 for ranks in by.values())
    assert sorted(read(tmp_path / "all")) == list(range(UNITS))
    # whoever was killed before the report: the next command writes it and does nothing else
    launch(tmp_path, [Line(tmp_path, n) for n in range(UNITS)], 1)
    assert read(tmp_path / "report-0") == list(range(UNITS))
    assert sum(map(len, done_by(tmp_path).values())) == UNITS + 1


def test_all_killed_continue_with_what_is_missing(tmp_path):
    at = UNITS // 2 + 2
    units = [Line(tmp_path, n, dies_in={2: "0", at: "1"}.get(n)) for n in range(UNITS)]
    codes, _ = launch(tmp_path, units)
    assert codes == [-signal.SIGKILL] * 2
    before = done_by(tmp_path)
    codes, _ = launch(tmp_path, [Line(tmp_path, n) for n in range(UNITS)])
    assert codes == [0, 0]
    again = {number for number, ranks in done_by(tmp_path).items() if len(ranks) > len(before.get(number, []))}
    assert again == set(range(UNITS)) - (before.keys() - {2, at})
    assert read(tmp_path / "report-0") == list(range(UNITS))


def test_a_failure_is_tried_once_and_the_first_process_hears_of_it(tmp_path):
    broken = [Line(tmp_path, n, fails=n in (1, UNITS - 2)) for n in range(UNITS)]
    _, said = launch(tmp_path, broken)
    names = {"unit 1", f"unit {UNITS - 2}"}
    assert set(said[0]["failures"]) == set(said[0]["told"]) == names
    assert all(len(ranks) == 1 for ranks in done_by(tmp_path).values())
    # the next command tries again
    launch(tmp_path, [Line(tmp_path, n) for n in range(UNITS)])
    assert sorted(read(tmp_path / "all")) == list(range(UNITS))


def test_reports_are_written_in_the_order_of_the_runs_and_when_interrupted(tmp_path):
    written, released = [], []

    class Stop(Said):
        def unit(self, where, name, done):
            super().unit(where, name, done)
            if len(self.begun) == 5:
                raise KeyboardInterrupt

    def jobs():
        for name in "abc":
            (tmp_path / name).mkdir(exist_ok=True)
            units = [Line(tmp_path / name, n, seconds=0) for n in range(3)]
            yield Job(units, lambda name=name: written.append(name), lambda name=name: released.append(name))

    with pytest.raises(KeyboardInterrupt):
        run_jobs(list(jobs()), tmp_path / LOCK, Stop())
    assert (written, released) == (["a", "b"], ["a"]), "the third run was not begun"
    said = Said()
    assert run_jobs(list(jobs()), tmp_path / LOCK, said) == []
    assert (len(said.skipped), len(said.begun)) == (4, 5)
    assert written == ["a", "b", "a", "b", "c"]
    assert not (tmp_path / LOCK).exists(), "a process alone locks nothing"
