"""Settings that hold before anything is imported, and the fixtures that all tests share."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

# importable as `loopback_hub` whether or not tests/ is a package
sys.path.insert(0, str(Path(__file__).parent))

from launcher import Launcher
from loopback_hub import LoopbackHub

# huggingface_hub, transformers and datasets read these once, at import. The endpoint is a reserved port of this
# machine that refuses connections until a test asks for `hub`, and there is no token and no cache but the tests' own:
# no test reaches the real Hub or the developer's files, by accident either.
_home = tempfile.mkdtemp(prefix="hf-lowrank-tests-")
_hub = LoopbackHub(_home)
for _name in ("HF_TOKEN", "HF_TOKEN_PATH", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE"):
    os.environ.pop(_name, None)
for _name in ("HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_OFFLINE"):
    os.environ.pop(_name, None)
os.environ |= {
    "HF_ENDPOINT": _hub.endpoint,
    "HF_HOME": _home,
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_XET": "1",
    "DISABLE_SAFETENSORS_CONVERSION": "1",
    "NO_PROXY": "127.0.0.1,localhost",
    "TOKENIZERS_PARALLELISM": "false",
}
# torch's own default is a thread a core, over which pytest's workers and the processes that tests launch would fight
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("MKL_NUM_THREADS", os.environ["OMP_NUM_THREADS"])

import pytest  # noqa: E402


@atexit.register
def _remove_home() -> None:
    shutil.rmtree(_home, ignore_errors=True)


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    """Runs `main` of a worker module in several processes, without an import of torch in each."""
    launcher = Launcher()
    yield launcher
    launcher.close()


@pytest.fixture(scope="session")
def _serving_hub() -> Iterator[LoopbackHub]:
    with _hub:
        yield _hub


@pytest.fixture
def hub(_serving_hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoopbackHub:
    """An empty stand-in for the Hugging Face Hub (loopback_hub.py), which this process uses, logged in as `user`.

    `env=hub.environment()` lets a subprocess use it, with the same cache.
    """
    from huggingface_hub import constants

    assert _serving_hub.endpoint == constants.ENDPOINT, "huggingface_hub was imported before tests/conftest.py"
    if not _serving_hub.alive:
        _serving_hub.start()
    _serving_hub.reset(home=tmp_path / "hf_home")
    monkeypatch.setenv("HF_TOKEN", _serving_hub.token)
    # unlike the endpoint, the cache is looked up at every call
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(_serving_hub.home / "hub"))
    monkeypatch.setattr(constants, "HUGGINGFACE_HUB_CACHE", str(_serving_hub.home / "hub"))
    if filesystem := sys.modules.get("huggingface_hub.hf_file_system"):
        filesystem.HfFileSystem.clear_instance_cache()  # it remembers listings, by repository name
    return _serving_hub


@pytest.fixture
def go_offline(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it for what HF_HUB_OFFLINE=1 does, from then to the end of the test."""
    from huggingface_hub import constants

    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def toy_method() -> Iterator[None]:
    """The method of toy_method.py is registered; no other module's tests see it."""
    from toy_method import ToyConfig

    from hf_lowrank.methods.base import METHODS, register

    register(ToyConfig)
    yield
    METHODS.pop(ToyConfig.method, None)


# these take longest, and no process should be left with one of them at the end
LONGEST = ("test_sharded.py", "test_recipe.py", "test_coverage.py", "test_killed.py", "test_training.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_collection_finish() -> None:
    """Trainer collects garbage at every `train()`; what is imported by now need not be looked through each time."""
    gc.collect()
    gc.freeze()
