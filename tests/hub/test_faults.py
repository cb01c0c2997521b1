"""Every fault at every request of a push and of a download: what is said, what is left behind, and going on from it.

The real client talks to the loopback hub. Its waits, and ours, are cut short and noted.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http
from loopback_hub import LoopbackHub

from hf_lowrank.cli import main
from hf_lowrank.hub import network
from hf_lowrank.hub.fetch import FetchError, fetch
from hf_lowrank.hub.push import PushError, push_folder

REPO = "user/tiny"
ALWAYS = 10_000
WEIGHTS = bytes(range(256)) * 400

# request -> what "METHOD /path" is, what a push says that it was doing
PUSH = {
    "create the repository": ("^POST /api/repos/create", "the repository cannot be made"),
    "read it": ("^GET /api/models/user/tiny/revision", "the repository cannot be read"),
    "read its history": ("^GET .*/commits/", "the repository cannot be read"),
    "check the card": ("/validate-yaml$", "the files cannot be uploaded and committed"),
    "preupload": ("/preupload/", "the files cannot be uploaded and committed"),
    "LFS batch": ("/objects/batch$", "the files cannot be uploaded and committed"),
    "LFS upload": ("^PUT /lfs/", "the files cannot be uploaded and committed"),
    "LFS verify": ("/verify$", "the files cannot be uploaded and committed"),
    "commit": ("/commit/main$", "the files cannot be uploaded and committed"),
    "read the tags": ("^GET .*/refs$", "the tag step-10 cannot be set"),
    "set the tag": ("^POST .*/tag/", "the tag step-10 cannot be set"),
}
BEFORE_THE_COMMIT = list(PUSH)[:8]

DOWNLOAD = {
    "look it up": "^GET /api/models/user/tiny",
    "report": r"/resolve/.*/report\.json$",
    "weights": r"/resolve/.*/model\.safetensors$",
}

# what is broken -> how, and a word of what is said
BREAKING: dict[str, tuple[Callable[[LoopbackHub, str, int], None], str]] = {
    "stalls": (lambda hub, match, times: hub.stall(match, 0.8, times), "the Hub does not answer"),
    "answer cut off": (lambda hub, match, times: hub.cut(match, times=times), "the connection broke off"),
    "request cut off": (lambda hub, match, times: hub.hang_up(match, 60, times), "the connection broke off"),
    "answer truncated": (lambda hub, match, times: hub.shorten(match, 1, times), "not one of the Hub's"),
}
REFUSALS = {
    401: "`hf auth login`",
    403: "use a token that may do this",
    404: "was it deleted or renamed",
    409: "try again",
    429: "try again in 0 seconds",
    500: "try again later",
    503: "try again later",
}


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that client and package wanted to sleep; they sleep a thousandth instead."""
    noted: list[float] = []

    def sleep(seconds: float) -> None:
        noted.append(seconds)
        real(0.001)

    real = time.sleep
    clock = SimpleNamespace(**{name: getattr(time, name) for name in dir(time) if not name.startswith("_")})
    clock.sleep = sleep
    for module in (_http, file_download, network):
        if hasattr(module, "time"):
            monkeypatch.setattr(module, "time", clock)
    return noted


@contextmanager
def impatient() -> Iterator[None]:
    """A Hub that is silent for half a second has failed; a busy machine may take that long for an answer as well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "SILENCE", 0.4)
        for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
            patch.setattr(constants, name, 0.4)
        yield


@pytest.fixture
def run(tmp_path: Path) -> Path:
    files = {
        "README.md": b"---\nlicense: mit\n---\n# tiny\n",
        "report.json": json.dumps({"run": {"name": "tiny", "method": "galore"}}).encode(),
        "model.safetensors": WEIGHTS,
        "metrics/spectral.parquet": b"PAR1\0\1\2PAR1",
    }
    for path, content in files.items():
        (tmp_path / "run" / "publish" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / "publish" / path).write_bytes(content)
    return tmp_path / "run"


def held(hub: LoopbackHub, revision: str = "main") -> dict[str, bytes]:
    return {path: content for path, content in hub.repo(REPO).files(revision).items() if path != ".gitattributes"}


def published(run: Path) -> dict[str, bytes]:
    folder = run / "publish"
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def goes_through(hub: LoopbackHub, run: Path) -> None:
    """A push now completes, and with what there was before it is one commit."""
    commit = push_folder(run, REPO, tag="step-10")
    assert held(hub) == published(run)
    assert len(list(hub.repo(REPO).head.history())) == 2
    assert {tag: to.oid for tag, to in hub.repo(REPO).tags.items()} == {"step-10": commit.oid}


def fails(run: Path, *words: str) -> str:
    """A push fails in one line that names the repository and has `words`."""
    with pytest.raises(PushError) as caught:
        push_folder(run, REPO, tag="step-10")
    said = str(caught.value)
    assert said.startswith(f"{REPO}: ")
    assert "\n" not in said
    assert "hf_loopback" not in said
    for word in words:
        assert word in said
    return said


# ---- a push ----


@pytest.mark.parametrize("status", REFUSALS)
@pytest.mark.parametrize("request_", PUSH)
def test_a_refused_push(hub: LoopbackHub, run: Path, slept: list[float], request_: str, status: int) -> None:
    match, doing = PUSH[request_]
    hub.fail(match, status=status, times=ALWAYS, headers={"Retry-After": "0"} if status == 429 else None)
    # what is refused is not done: a repository that "exists" already is read next, and is not there
    known = (request_, status) == ("create the repository", 409)
    words = ["not one of the Hub's"] if known else [doing, f"the Hub answers {status}", REFUSALS[status]]
    # the second time, what has to be verified is there already
    said = fails(run, *words) if not (request_ == "LFS verify" and status in network.PASSING) else ""
    if request_ == "LFS upload":
        assert "model.safetensors" in said or "spectral.parquet" in said
    if request_ in BEFORE_THE_COMMIT and said:
        assert not hub.repos or held(hub) == {}
    hub.faults.clear()
    goes_through(hub, run)


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize("request_", PUSH)
def test_a_push_that_is_refused_once_goes_through(
    hub: LoopbackHub, run: Path, slept: list[float], request_: str, status: int
) -> None:
    hub.fail(PUSH[request_][0], status=status, headers={"Retry-After": "2"} if status == 429 else None)
    goes_through(hub, run)
    assert 0 < sum(slept) <= 3.0
    if status == 429:
        assert min(slept) >= 2.0


@pytest.mark.parametrize("request_", PUSH)
def test_a_hub_that_asks_for_an_hour_is_not_waited_for(
    hub: LoopbackHub, run: Path, slept: list[float], request_: str
) -> None:
    hub.fail(PUSH[request_][0], status=429, times=ALWAYS, headers={"Retry-After": "3600"})
    fails(run, PUSH[request_][1], "429", "try again in 3600 seconds")
    assert slept == []
    hub.faults.clear()
    goes_through(hub, run)


@pytest.mark.parametrize("header", ["Wed, 21 Oct 2065 07:28:00 GMT", '"api";r=0;t=3600'])
def test_other_ways_to_ask_for_patience(hub: LoopbackHub, run: Path, slept: list[float], header: str) -> None:
    name = "RateLimit" if "api" in header else "Retry-After"
    hub.fail("/preupload/", status=429, times=ALWAYS, headers={name: header})
    fails(run, "429", "try again in ")
    assert slept == []


@pytest.mark.parametrize("fault", BREAKING)
@pytest.mark.parametrize("request_", PUSH)
def test_a_push_that_breaks(hub: LoopbackHub, run: Path, slept: list[float], request_: str, fault: str) -> None:
    (match, doing), (breaks, word) = PUSH[request_], BREAKING[fault]
    breaks(hub, match, ALWAYS)
    # these are carried out all the same, or need no answer
    done_anyway = (request_ in ("set the tag", "commit") and fault == "answer cut off") or (
        request_ in ("LFS upload", "LFS verify", "set the tag") and fault == "answer truncated"
    )
    if not done_anyway:
        with impatient() if fault == "stalls" else nullcontext():
            fails(run, doing, word)
    hub.faults.clear()
    goes_through(hub, run)


@pytest.mark.parametrize("request_", PUSH)
def test_a_hub_that_dies_and_comes_back(hub: LoopbackHub, run: Path, slept: list[float], request_: str) -> None:
    hub.die_at(PUSH[request_][0], after=100)
    fails(run, PUSH[request_][1], "the Hub cannot be reached")
    fails(run, "the repository cannot be made: the Hub cannot be reached")
    hub.start()
    goes_through(hub, run)


def test_an_interrupted_push_does_not_upload_again(hub: LoopbackHub, run: Path, slept: list[float]) -> None:
    hub.fail("/commit/main", status=503, times=ALWAYS)
    fails(run, "503")
    assert (hub.count("^PUT /lfs/", status=200), held(hub)) == (2, {})
    hub.faults.clear()
    goes_through(hub, run)
    assert hub.count("^PUT /lfs/") == 2


def test_others_that_never_stop_committing(hub: LoopbackHub, run: Path) -> None:
    push_folder(run, REPO)
    (run / "publish" / "more.json").write_text("{}")
    hub.meanwhile("/preupload/", lambda: hub.plant(REPO, {"LICENSE": str(time.time()).encode()}), times=ALWAYS)
    fails(run, "others keep committing to main (412)")
    hub.faults.clear()
    push_folder(run, REPO)
    assert {"LICENSE", "more.json"} <= set(held(hub))


def test_a_report_that_arrives_damaged_is_not_taken_for_no_report(hub: LoopbackHub, run: Path) -> None:
    push_folder(run, REPO)
    (run / "publish" / "report.json").write_text(json.dumps({"run": {"name": "other", "method": "cola"}}))
    hub.corrupt("^GET .*/report.json", times=ALWAYS)
    fails(run, "the repository cannot be read", "damaged")


def test_what_was_running_on_the_session_keeps_its_limits(hub: LoopbackHub, run: Path) -> None:
    before = network.get_session().event_hooks
    push_folder(run, REPO)
    assert network.get_session().event_hooks == before


# ---- a download ----


def fetch_fails(*words: str) -> None:
    with pytest.raises(FetchError) as caught:
        fetch(REPO)
    said = str(caught.value)
    assert said.startswith(f"{REPO} at revision 'main'")
    assert "\n" not in said
    for word in words:
        assert word in said


def arrives(run: Path) -> None:
    """A download now completes, whole."""
    folder = fetch(REPO)
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert files == published(run)


@pytest.fixture
def on_hub(hub: LoopbackHub, run: Path) -> LoopbackHub:
    push_folder(run, REPO)
    hub.requests.clear()
    return hub


@pytest.mark.parametrize("status", [401, 403, 404, 409, 412, 429, 500, 503])
@pytest.mark.parametrize("request_", DOWNLOAD)
def test_a_refused_download(on_hub: LoopbackHub, run: Path, slept: list[float], request_: str, status: int) -> None:
    on_hub.fail(DOWNLOAD[request_], status=status, times=ALWAYS, headers={"Retry-After": "0"})
    fetch_fails("`hf auth login`" if status in (401, 403) else str(status))
    on_hub.faults.clear()
    arrives(run)


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize("request_", DOWNLOAD)
def test_a_download_refused_once_arrives(
    on_hub: LoopbackHub, run: Path, slept: list[float], request_: str, status: int
) -> None:
    on_hub.fail(DOWNLOAD[request_], status=status, headers={"Retry-After": "2"} if status == 429 else None)
    arrives(run)
    assert not slept or sum(slept) <= 3.0


@pytest.mark.parametrize("request_", DOWNLOAD)
def test_a_download_from_a_hub_that_stalls(on_hub: LoopbackHub, run: Path, slept: list[float], request_: str) -> None:
    on_hub.stall(DOWNLOAD[request_], 0.8, times=ALWAYS)
    with impatient():
        fetch_fails()
    on_hub.faults.clear()
    arrives(run)


@pytest.mark.parametrize("request_", ["report", "weights"])
def test_a_download_that_stalls_or_is_cut_half_way_goes_on_from_there(
    on_hub: LoopbackHub, run: Path, slept: list[float], request_: str
) -> None:
    on_hub.stall(f"^GET {DOWNLOAD[request_].removeprefix('^')}".replace("GET /", "GET .*/"), 0.8, after=20)
    on_hub.cut("^GET .*model.safetensors", after=50_000)
    with impatient():
        arrives(run)


def test_a_hub_that_dies_in_a_download_and_comes_back(on_hub: LoopbackHub, run: Path, slept: list[float]) -> None:
    on_hub.die_at("^GET .*model.safetensors")
    fetch_fails()
    fetch_fails("the Hub cannot be reached")
    on_hub.start()
    arrives(run)


@pytest.mark.parametrize("spoil", ["corrupt", "shorten"])
@pytest.mark.parametrize("file", [r"model\.safetensors", r"report\.json", r"README\.md", r"spectral\.parquet"])
def test_damaged_bytes_are_found_and_fetched_again(
    on_hub: LoopbackHub, run: Path, slept: list[float], file: str, spoil: str
) -> None:
    match = f"^GET .*{file}$"

    def strike(times: int) -> None:
        if spoil == "corrupt":
            on_hub.corrupt(match, times)
        else:
            on_hub.shorten(match, 5, times)

    strike(1)
    arrives(run)
    assert on_hub.count(match) >= 2

    (run / "publish" / "model.safetensors").write_bytes(WEIGHTS[1:])
    for name in ("report.json", "README.md", "metrics/spectral.parquet"):
        path = run / "publish" / name
        path.write_bytes(path.read_bytes() + b"\n")
    push_folder(run, REPO)
    strike(ALWAYS)
    fetch_fails("damaged" if spoil == "corrupt" else "size", file.replace("\\", "") if spoil == "corrupt" else "")
    on_hub.faults.clear()
    arrives(run)


# ---- from the command line ----


@pytest.mark.parametrize("command", ["push", "load"])
@pytest.mark.parametrize("fault", [*REFUSALS, *BREAKING])
def test_the_command_says_it_in_one_line(
    hub: LoopbackHub,
    run: Path,
    slept: list[float],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    fault: int | str,
) -> None:
    push_folder(run, REPO)
    if isinstance(fault, int):
        hub.fail(".", status=fault, times=ALWAYS, headers={"Retry-After": "0"})
    else:
        BREAKING[fault][0](hub, ".", ALWAYS)
    argv = ["push", str(run), "--repo-id", REPO] if command == "push" else ["load", REPO]
    monkeypatch.setattr(sys, "argv", ["hf-lowrank", *argv])
    monkeypatch.setattr("hf_lowrank.hub.push.push", lambda run, repo_id, **given: push_folder(run, repo_id))
    with impatient() if fault == "stalls" else nullcontext(), pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr()
    assert (stop.value.code, said.out) == (2, "")
    line = said.err.splitlines()[-1]
    assert line.startswith("error: ")
    assert REPO in line
    assert "Traceback" not in said.err
    assert "hf_loopback" not in said.err
