"""Plugins: modules of other packages that register what they define."""

import sys

import pytest

from hf_lowrank.plugins import load_plugins


@pytest.fixture
def install(tmp_path, monkeypatch):
    """A function that puts a package with a plugin where Python finds it."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def package(name, code):
        (tmp_path / f"{name}.py").write_text(code)
        metadata = tmp_path / f"{name}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(f"[hf_lowrank.plugins]\n{name} = {name}\n")

    return package


def test_a_plugin_is_imported_once(install):
    install("toy_plugin", "import builtins\nbuiltins.toy_imports = getattr(builtins, 'toy_imports', 0) + 1\n")
    load_plugins()
    sys.modules.pop("toy_plugin")
    load_plugins()
    import builtins

    assert builtins.toy_imports == 1


def test_a_broken_plugin_is_left_out_with_a_warning(install, caplog):
    install("broken_plugin", "import no_such_module\n")
    load_plugins()
    assert "broken_plugin" in caplog.text
    assert "no_such_module" in caplog.text


def test_a_plugin_may_ask_for_plugins(install):
    install("asking_plugin", "from hf_lowrank.plugins import load_plugins\nload_plugins()\n")
    load_plugins()
    assert "asking_plugin" in sys.modules
