"""The line of pushes beside a training run, with a push that is told what to do."""

import threading

import pytest

from hf_lowrank.hub.background import LONGEST, PushQueue


@pytest.fixture
def publish(tmp_path):
    (tmp_path / "publish").mkdir()
    return tmp_path / "publish"


class Hub:
    """Notes what is pushed, and holds each push until `open` is set."""

    def __init__(self):
        self.pushed, self.works, self.open = [], True, threading.Event()
        self.at_once, self.most = 0, 0

    def push(self, folder, message):
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        assert self.open.wait(10)
        self.at_once -= 1
        if self.works:
            self.pushed.append((message, (folder / "report.json").read_text()))
        return self.works


def save(queue, publish, step):
    (publish / "report.json").write_text(str(step))
    queue.add(publish, f"step {step}")


def test_states_are_pushed_as_they_were_saved_in_order_and_one_at_a_time(publish):
    hub = Hub()
    queue = PushQueue(hub.push)
    for step in (1, 2, 3):
        save(queue, publish, step)
    assert hub.pushed == []
    hub.open.set()
    (publish / "report.json").write_text("4")
    queue.finish(publish, "end")
    assert hub.pushed == [("step 1", "1"), ("step 2", "2"), ("step 3", "3"), ("end", "4")]
    assert hub.most == 1
    assert [path.name for path in publish.parent.iterdir()] == ["publish"]


def test_what_failed_stays_in_line(publish):
    hub = Hub()
    hub.open.set()
    hub.works = False
    queue = PushQueue(hub.push)
    save(queue, publish, 1)
    queue.wait()
    hub.works = True
    save(queue, publish, 2)
    queue.wait()
    assert hub.pushed == [("step 1", "1"), ("step 2", "2")]
    hub.works = False
    save(queue, publish, 3)
    queue.finish(publish, "end")
    assert len(hub.pushed) == 2
    assert [path.name for path in publish.parent.iterdir()] == ["publish"]


def test_the_line_has_an_end(publish, caplog):
    hub = Hub()
    queue = PushQueue(hub.push)
    for step in range(1, LONGEST + 3):
        save(queue, publish, step)
    assert len(list(publish.parent.glob(".pushing*"))) == LONGEST
    hub.open.set()
    queue.wait()
    assert [message for message, _ in hub.pushed] == ["step 1", "step 4", "step 5"]
    assert "step 2 gives way to later saves" in caplog.text
    assert "step 3 gives way to later saves" in caplog.text


def test_a_new_training_forgets_what_waited(publish):
    hub = Hub()
    queue = PushQueue(hub.push)
    for step in (1, 2):
        save(queue, publish, step)
    queue.clear(publish.parent)
    hub.works = False
    hub.open.set()
    queue.wait()
    hub.works = True
    save(queue, publish, 3)
    queue.wait()
    assert hub.pushed == [("step 3", "3")]
