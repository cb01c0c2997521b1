"""Figures of loss and spectra from parquet tables, ordinary and odd; test_figures_metrics.py has the others.

What they look like is for eyes; that they are there is for tests.
"""

import sys
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from hf_lowrank.figures import draw_figures
from hf_lowrank.figures.drawing import STYLE, evenly, short_names
from hf_lowrank.figures.loss import loss as loss_figure
from hf_lowrank.figures.tables import one_space, table_up_to
from hf_lowrank.report.catalogue import HEADLINE_METRICS

LLAMA = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
GPT2 = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
EXPERTS = [f"mlp.experts.{number}.up_proj" for number in range(20)]
WEIGHT = [metric.name for metric in HEADLINE_METRICS if metric.name.startswith("spectral/weight/")]
UPDATE = [metric.name for metric in HEADLINE_METRICS if metric.name.startswith("spectral/update/")]
NAMES = ["loss.png", "spectra_over_steps.png", "spectra_over_depth.png"]


def spectral(
    layers: int = 2, steps: tuple[int, ...] = (0, 10), kinds: list[str] = LLAMA, space: str = "dense"
) -> pd.DataFrame:
    random = np.random.default_rng(0)
    rows = [
        {"step": step, "space": space, "name": f"layers.{layer}.{kind}", "layer": layer, "module": kind}
        | {"rows": 8, "cols": 8, "error": None}
        | dict(zip(WEIGHT, random.uniform(0.1, 1.0, 3), strict=True))
        | dict(zip(UPDATE, random.uniform(0.1, 1.0, 3) if step else [np.nan] * 3, strict=True))
        for step in steps
        for layer in range(layers)
        for kind in kinds
    ]
    return pd.DataFrame(rows)


def training(steps: int = 30, low: float = 3.6, high: float = 8.3) -> pd.DataFrame:
    rows = [{"step": step, "loss": high - (high - low) * step / steps} for step in range(1, steps + 1)]
    rows += [{"step": step, "eval_loss": high - (high - low) * step / steps} for step in range(10, steps + 1, 10)]
    return pd.DataFrame(rows).assign(epoch=0.1, learning_rate=0.01)


def draw(publish: Path, spectra: pd.DataFrame | None = None, log: pd.DataFrame | None = None) -> list[str]:
    (publish / "metrics").mkdir(parents=True, exist_ok=True)
    for name, table in (("spectral", spectra), ("training", log)):
        if table is not None:
            table.to_parquet(publish / "metrics" / f"{name}.parquet")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = draw_figures(publish)
    assert all(path.parent == publish / "figures" and path.is_file() for path in drawn)
    assert {path.name for path in (publish / "figures").glob("*")} == {path.name for path in drawn}
    return [path.name for path in drawn]


def test_all_three_twice(tmp_path: Path) -> None:
    assert draw(tmp_path, spectral(), training()) == NAMES
    for name in NAMES:
        with Image.open(tmp_path / "figures" / name) as image:
            assert 600 <= image.width <= 1800
            assert 400 <= image.height <= 1200
            assert round(image.info["dpi"][0]) == 150
            assert set(image.info) <= {"dpi"}, "neither dates nor versions"
            colours = image.convert("RGB").getcolors(1 << 24)
            assert len(colours or []) > 20, "not a blank picture"
    first = {name: (tmp_path / "figures" / name).read_bytes() for name in NAMES}
    draw(tmp_path)
    assert first == {name: (tmp_path / "figures" / name).read_bytes() for name in NAMES}, "same tables, same bytes"


@pytest.mark.slow
@pytest.mark.parametrize(
    "spectra",
    [
        spectral(layers=100, steps=(0, 60_000), kinds=GPT2, space="linearised").replace(
            spectral()[WEIGHT[0]][0], np.inf
        ),
        spectral(kinds=[*GPT2, *EXPERTS, "_orig.$x$", "mlp.a", "mlp.b", "mlp.c"]).assign(
            **dict.fromkeys(UPDATE, np.nan)
        ),
        spectral().assign(**dict.fromkeys(UPDATE, np.nan), layer=[*range(27), np.nan]).assign(**{WEIGHT[0]: 0.5}),
    ],
    ids=["100 layers, infinite", "experts", "constant, no updates, one without a layer"],
)
def test_odd_spectra(tmp_path: Path, spectra: pd.DataFrame) -> None:
    assert draw(tmp_path, spectra) == NAMES[1:]


@pytest.mark.parametrize(
    "log",
    [
        training(100, low=2.5, high=2.5),
        training(low=1.0, high=1e6),
        training().drop(columns="eval_loss"),
        training().drop(columns="loss"),
        training().assign(loss=np.inf),
    ],
    ids=["flat", "diverged", "no validation", "no training loss", "infinite"],
)
def test_odd_losses(tmp_path: Path, log: pd.DataFrame) -> None:
    assert draw(tmp_path, None, log) == NAMES[:1]


def test_nothing_to_draw(tmp_path: Path) -> None:
    assert draw(tmp_path) == []
    nothing = spectral().assign(**dict.fromkeys(WEIGHT + UPDATE, np.nan))
    assert draw(tmp_path, nothing, training().drop(columns=["loss", "eval_loss"])) == []
    assert draw(tmp_path, spectral().head(0), training().head(0)) == []
    # a single point a panel says nothing that a table does not
    assert draw(tmp_path, spectral(layers=1, steps=(0,)), training(1)) == []
    one_step, one_layer = spectral(steps=(10,)), spectral(layers=1)
    assert (draw(tmp_path, one_step), draw(tmp_path, one_layer)) == (NAMES[2:], NAMES[1:2])


def test_stale_figure_is_removed(tmp_path: Path) -> None:
    assert draw(tmp_path, None, training()) == NAMES[:1]
    (tmp_path / "metrics" / "training.parquet").unlink()
    assert draw(tmp_path) == []


def test_spaces_do_not_mix(tmp_path: Path) -> None:
    both = pd.concat([spectral(), spectral(space="native").assign(**{WEIGHT[0]: 1e6})])
    assert set(one_space(both)["space"]) == {"dense"}


def test_broken_tables_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"training\.parquet: no column step"):
        draw(tmp_path, None, training().drop(columns="step"))
    with pytest.raises(ValueError, match=r"training\.parquet: column loss holds something that is no number"):
        draw(tmp_path, None, training().assign(loss="low"))
    (tmp_path / "metrics" / "training.parquet").write_bytes(b"PAR1 cut short")
    with pytest.raises(ValueError, match=r"training\.parquet: not readable as parquet"):
        draw(tmp_path)


def test_global_state_is_left_alone(tmp_path: Path) -> None:
    before, pyplot = dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules
    draw(tmp_path, None, training())
    assert dict(matplotlib.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == pyplot


def test_perplexity_axis_marks_what_the_loss_axis_shows() -> None:
    with matplotlib.rc_context(STYLE):
        figure = loss_figure(training())
    assert figure is not None
    loss, right = figure.axes
    assert right.get_ylim() == loss.get_ylim()
    for tick, label in zip(right.get_yticks(), right.get_yticklabels(), strict=True):
        assert np.exp(tick) == pytest.approx(float(label.get_text().replace(",", "")), rel=1e-3)


def test_names_stay_short_and_different() -> None:
    assert short_names(["a", "b", "a"]) == {"a": "a", "b": "b"}
    assert short_names(["_a$b"]) == {"_a$b": r" _a\$b"}
    long = [f"llama_60m_c4_{method}_rank128_lr0.01_warmup1000_seed0" for method in ("galore", "fira", "apollo")]
    assert list(short_names(long).values())[1].startswith("…fira_rank128"), "without what all begin with"
    same = [f"{'x' * 30}{middle}{'y' * 30}" for middle in "abc"]
    assert len(set(short_names(same).values())) == 3
    assert all(len(text) < 45 for text in short_names([*same, *long, "two\nlines", ""]).values())


def test_evenly_keeps_both_ends() -> None:
    assert evenly([1, 2, 3], 6) == [1, 2, 3]
    assert evenly(range(0, 1001, 10), 6) == [0, 200, 400, 600, 800, 1000]


def test_figures_of_metrics_end_at_the_best_step():
    table = pd.DataFrame({"step": [0, 2, 4], "value": [1.0, 2.0, 3.0]})
    assert list(table_up_to(2, "spectral", table)["step"]) == [0, 2]
    assert list(table_up_to(2, "training", table)["step"]) == list(table_up_to(None, "spectral", table)["step"])
