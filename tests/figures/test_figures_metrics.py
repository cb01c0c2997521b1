"""Figures of landscapes, interpolation, barriers, activations and curvature: that they are there and show the data."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from hf_lowrank.figures import draw_figures
from hf_lowrank.figures.activation import similarity_over_depth, similarity_over_steps
from hf_lowrank.figures.curvature import curvature_over_steps
from hf_lowrank.figures.drawing import STYLE
from hf_lowrank.figures.interpolation import barrier_map, barriers_over_steps, interpolation_paths
from hf_lowrank.figures.landscape import landscape_curves, sharpness_over_steps
from hf_lowrank.figures.tables import lines
from hf_lowrank.report.catalogue import CATALOGUE

Data = Any  # a table, or the records of a JSON file

LONG = [f"llama_60m_c4_{method}_rank128_lr0.01_warmup1000_seed0" for method in ("galore", "fira", "apollo")]
ODD = ["_private", "a$b$c", "x" * 200, "two\nlines", ""]


def landscape(steps: tuple[int, ...] = (0, 100), spaces: tuple[str, ...] = ("native",), directions: int = 4) -> Data:
    grid = np.linspace(-0.1, 0.1, 5)
    counts = {"random": directions, "svd_1": 1, "svd_k": 3, "trajectory": 2, "random_mean": 1}
    return pd.DataFrame(
        {"step": step, "space": space, "subject": subject, "direction": direction}
        # components of the trajectory have grids of their own
        | {
            "x": x * (direction + 1 if subject == "trajectory" else 1),
            "loss": 10 - step / 20 + (direction + 1) * x * x,
        }
        for step in steps
        for space in spaces
        for subject, count in counts.items()
        for direction in range(count)
        for x in grid
    )


def record(name: str, value: float | None, step: int | None, space: str | None = "native", **settings: Any) -> dict:
    stderr = None if value is None or step == 0 else abs(value) / 10
    return {"name": name, "value": value, "stderr": stderr, "step": step, "settings": settings, "space": space}


def sharpness(steps: tuple[int, ...] = (0, 50, 100), **settings: Any) -> list[dict]:
    names = ("random/sharpness", "random/variance", "svd_1/sharpness", "svd_k/sharpness", "svd_k/variance")
    return [record(f"landscape/{name}", 1 / (step + 1), step, **settings) for name in names for step in steps]


def curvature(steps: tuple[int, ...] = (0, 50)) -> list[dict]:
    names = ("curvature/top_eigenvalue", "curvature/trace")
    return [record(name, 5.0 - step, step, None) for name in names for step in steps]


def interpolation(steps: tuple[int, ...] = (10, 20), peers: Sequence[str] = ("a", "b"), space: str = "dense") -> Data:
    ends = [("consecutive", f"step {step - 10}", step, step - 10) for step in steps]
    ends += [(subject, peer, step, step) for subject in CROSS for peer in peers for step in steps]
    return pd.DataFrame(
        {"step": step, "space": space, "subject": subject, "other": other, "other_step": other_step}
        | {"alpha": alpha, "loss": 4 + alpha * (1 - alpha) * step}
        for subject, other, step, other_step in ends
        for alpha in np.linspace(0, 1, 5)
    )


CROSS = ("cross_method", "cross_method_aligned", "cross_seed", "cross_seed_aligned")


def barriers(steps: tuple[int, ...] = (10, 20), peers: Sequence[str] = ("a", "b")) -> list[dict]:
    kinds = ("barrier", "barrier_chord")
    found = [
        record(f"interpolation/consecutive/{kind}", step / 1e3, step, "dense", other=f"step {step - 10}")
        for step in steps
        for kind in kinds
    ]
    return found + [
        record(f"interpolation/{subject}/{kind}", step / 10, step, "dense", other=peer, other_step=step)
        for subject in CROSS
        for peer in peers
        for step in steps
        for kind in kinds
    ]


def between_runs(runs: Sequence[str] = ("a0", "b0", "a1"), aligned: tuple[bool, ...] = (False, True)) -> Data:
    return pd.DataFrame(
        {"run_a": a, "method_a": a[:1], "run_b": b, "method_b": b[:1], "step": 100, "aligned": which}
        | {"barrier": (i + 2.0 * j) / (2 if which else 1)}
        for which in aligned
        for i, a in enumerate(runs)
        for j, b in enumerate(runs)
        if i < j
    )


def activation(steps: tuple[int, ...] = (0, 50, 100), layers: int = 3, baseline: str = "fullrank") -> Data:
    return pd.DataFrame(
        {"step": step, "layer": layer, "baseline": baseline, "baseline_step": step}
        | {"activation/relative_l2": (layer + 1) * (step + 1) / 1e3, "activation/cosine": 1 - (layer + step) / 1e3}
        | {"activation/cka": 1 - step / 1e3, "activation/cka_debiased": 0.9 - step / 1e3 if layer else np.nan}
        | {"activation/norm": 1.0, "activation/baseline_norm": 1.0}
        for step in steps
        for layer in range(layers)
    )


DATA: dict[str, Data] = {
    "landscape.parquet": landscape(),
    "landscape.json": sharpness(),
    "curvature.json": curvature(),
    "interpolation.parquet": interpolation(),
    "interpolation.json": barriers(),
    "barrier_map.parquet": between_runs(),
    "activation.parquet": activation(),
}
DRAWN = {
    "landscape_curves.png": "landscape.parquet",
    "sharpness_over_steps.png": "landscape.json",
    "curvature_over_steps.png": "curvature.json",
    "interpolation_paths.png": "interpolation.parquet",
    "barriers_over_steps.png": "interpolation.json",
    "barrier_map.png": "barrier_map.parquet",
    "similarity_over_steps.png": "activation.parquet",
    "similarity_over_depth.png": "activation.parquet",
}


def write(publish: Path, data: dict[str, Data]) -> None:
    (publish / "metrics").mkdir(parents=True, exist_ok=True)
    for name, content in data.items():
        path = publish / "metrics" / name
        if isinstance(content, pd.DataFrame):
            content.to_parquet(path)
        else:
            path.write_text(json.dumps(content))


def draw(publish: Path, data: dict[str, Data]) -> list[str]:
    write(publish, data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = draw_figures(publish)
    assert {path.name for path in (publish / "figures").glob("*")} == {path.name for path in drawn}
    return [path.name for path in drawn]


def records(listed: list[dict]) -> pd.DataFrame:
    """Records as `read_records` returns them."""
    return pd.DataFrame(listed).assign(space=lambda table: table["space"].fillna("")).dropna(subset=["value", "step"])


def figure_of(draw_one: Any, table: pd.DataFrame) -> Figure:
    with matplotlib.rc_context(STYLE):
        figure = draw_one(table)
    assert figure is not None
    return figure


def panel(figure: Figure, title: str) -> Any:
    (found,) = [axes for axes in figure.axes if axes.get_title().replace("\n", " ").startswith(title)]
    return found


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_all_twice_then_none(tmp_path: Path) -> None:
    assert draw(tmp_path, DATA) == list(DRAWN)
    for name in DRAWN:
        with Image.open(tmp_path / "figures" / name) as image:
            assert 400 <= image.width <= 1800
            assert 400 <= image.height <= 1400
            assert set(image.info) <= {"dpi"}, "neither dates nor versions"
            assert len(image.convert("RGB").getcolors(1 << 24) or []) > 20, "not a blank picture"
    first = {name: (tmp_path / "figures" / name).read_bytes() for name in DRAWN}
    draw(tmp_path, {})
    assert first == {name: (tmp_path / "figures" / name).read_bytes() for name in DRAWN}, "same tables, same bytes"
    for name in DATA:
        (tmp_path / "metrics" / name).unlink()
    assert draw(tmp_path, {}) == [], "pictures without data are removed"


def test_every_picture_has_a_caption_in_the_order_of_drawing() -> None:
    pictures = [picture for entry in CATALOGUE for picture in entry.pictures]
    assert all(picture.caption for picture in pictures)
    assert {picture.file: picture.source for picture in pictures if picture.file in DRAWN} == DRAWN


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "absent"),
    [
        (
            {
                "landscape.parquet": landscape((100,), directions=1),
                "landscape.json": sharpness((100,)),
                "curvature.json": curvature((100,)),
                "interpolation.parquet": interpolation((10,)),
                "interpolation.json": barriers((10,)),
                "barrier_map.parquet": between_runs(["a", "b"], (True,)),
                "activation.parquet": activation((100,), layers=1),
            },
            {name for name in DRAWN if name.endswith(("over_steps.png", "over_depth.png"))},
        ),
        (
            {
                "landscape.parquet": landscape((0, 10), ("native", "dense"), directions=40).assign(
                    loss=lambda table: 3 + table["x"] ** 2 * 1e6 * (table["direction"] % 3 != 1)
                ),
                "landscape.json": sharpness((0, 1000)) + sharpness((0, 1000), space="dense"),
                "curvature.json": curvature((0, 1)),
                "interpolation.parquet": interpolation(tuple(range(10, 500, 10)), ODD),
                "interpolation.json": barriers((10, 20), ODD),
                "barrier_map.parquet": between_runs(ODD),
                "activation.parquet": activation(tuple(range(50)), 50, ODD[1]),
            },
            set(),
        ),
        (
            {
                **{name: table for name, table in DATA.items() if name.endswith("json")},
                "interpolation.parquet": interpolation((10, 20), LONG * 4),
                "barrier_map.parquet": between_runs([f"{name}-{n}" for name in LONG for n in range(4)]),
                "activation.parquet": activation(baseline=LONG[0]),
            },
            {"landscape_curves.png"},
        ),
    ],
    ids=["one step", "odd names, huge losses", "long names"],
)
def test_odd_data(tmp_path: Path, data: dict[str, Data], absent: set[str]) -> None:
    assert draw(tmp_path, data) == [name for name in DRAWN if name not in absent]


def test_missing_numbers_are_left_out(tmp_path: Path) -> None:
    holes: dict[str, Data] = {}
    for name, column in (
        ("landscape.parquet", "loss"),
        ("interpolation.parquet", "loss"),
        ("barrier_map.parquet", "barrier"),
        ("activation.parquet", "activation/cosine"),
    ):
        table = DATA[name].copy()
        table.loc[table.index[:1], column], table.loc[table.index[-1:], column] = np.nan, np.inf
        holes[name] = table
    for name in ("landscape.json", "curvature.json", "interpolation.json"):
        kind = DATA[name][0]["name"]
        holes[name] = [*DATA[name], record(kind, None, 20), record(kind, 1.0, None)]
    assert draw(tmp_path, holes) == list(DRAWN)

    nothing: dict[str, Data] = {}
    for name, content in DATA.items():
        if isinstance(content, pd.DataFrame):
            numbers = [column for column in content if column in ("loss", "barrier") or "activation/" in column]
            nothing[name] = content.assign(**dict.fromkeys(numbers, np.nan))
        else:
            nothing[name] = [{**each, "value": None} for each in content]
    assert draw(tmp_path, nothing) == []
    assert draw(tmp_path, {name: content[:0] for name, content in DATA.items()}) == []


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("landscape.parquet", "loss"),
        ("interpolation.parquet", "other"),
        ("barrier_map.parquet", "aligned"),
        ("activation.parquet", "baseline_step"),
    ],
)
def test_broken_tables_are_named(tmp_path: Path, name: str, column: str) -> None:
    table: Any = DATA[name]
    write(tmp_path, {name: table.drop(columns=column)})
    with pytest.raises(ValueError, match=rf"{name}: no column {column}; there are "):
        draw_figures(tmp_path)
    write(tmp_path, {name: table.assign(step="first")})
    with pytest.raises(ValueError, match=rf"{name}: column step holds something that is no number"):
        draw_figures(tmp_path)
    (tmp_path / "metrics" / name).write_bytes(b"PAR1 cut short")
    with pytest.raises(ValueError, match=rf"{name}: not readable as parquet"):
        draw_figures(tmp_path)


@pytest.mark.parametrize("name", ["landscape.json", "interpolation.json", "curvature.json"])
@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[{", "not readable as JSON"),
        ("{}", "not a list of records"),
        ("[1]", "not a list of records"),
        ('[{"name": "a"}]', "record 0 has no value, stderr, step, settings, space; it has name"),
        (json.dumps([{**record("a", 1.0, 1), "value": "much"}]), "value holds something that is no number"),
        (json.dumps([{**record("a", 1.0, 1), "settings": []}]), r"settings of record 0 are \[\] and no object"),
    ],
)
def test_broken_records_are_named(tmp_path: Path, name: str, text: str, problem: str) -> None:
    write(tmp_path, {})
    (tmp_path / "metrics" / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name}: {problem}"):
        draw_figures(tmp_path)


def test_landscape_shows_mean_and_first_step_at_the_last_centre() -> None:
    figure = figure_of(landscape_curves, landscape())
    axes = panel(figure, "4 random directions")
    first, *_, mean = axes.get_lines()
    assert mean.get_ydata() == pytest.approx(5 + 2.5 * np.linspace(-0.1, 0.1, 5) ** 2)
    assert first.get_linestyle() == "--"
    assert first.get_ydata() == pytest.approx(mean.get_ydata()), "the same curve five nats lower"
    components = panel(figure, "Principal components").get_lines()
    assert [line.get_xdata()[-1] for line in components] == pytest.approx([0.1, 0.2])
    assert not np.isnan(np.concatenate([line.get_ydata() for line in components])).any()
    assert "mean at step 0, shifted to meet at x = 0" in legend(figure)


def test_mean_is_left_out_where_a_direction_has_no_loss() -> None:
    table = landscape((100,))
    table.loc[(table["subject"] == "random") & (table["direction"] == 0) & (table["x"] > 0.09), "loss"] = np.nan
    mean = panel(figure_of(landscape_curves, table), "4 random directions").get_lines()[-1].get_ydata()
    assert np.isnan(mean).tolist() == [False, False, False, False, True]


def test_records_are_lines_by_space_and_by_what_differs() -> None:
    listed = [record("m", 1.0, step, space, K=k, seed=step) for step in (1, 2) for space in "ab" for k in (5, 20)]
    found = dict(lines(records([*listed, record("m", 9.0, 2, "b", K=20, seed=2)])))
    assert list(found) == ["a weights, K=5", "a weights, K=20", "b weights, K=5", "b weights, K=20"]
    assert found["b weights, K=20"]["value"].tolist() == [1.0, 9.0], "the later of two"
    assert [name for name, _ in lines(records([record("m", 1.0, 1, None)]))] == [""]


def test_sharpness_in_two_spaces_and_curvature() -> None:
    both = records(sharpness() + sharpness(space="dense"))
    figure = figure_of(sharpness_over_steps, both)
    assert legend(figure) == ["native weights", "dense weights"]
    titles = [axes.get_title().replace("\n", " ") for axes in figure.axes]
    assert [title.split()[1] for title in titles] == ["sharpness,"] * 3 + ["variance"] * 2
    assert figure.axes[0].get_yscale() == "log"
    # no offset at the end of an axis, "+3.586e1", from which its ticks are to be counted
    close = [record("curvature/trace", 35.8646 + step / 1e5, step, None) for step in (0, 50)]
    with matplotlib.rc_context(STYLE):
        (axes,) = figure_of(curvature_over_steps, records(close)).axes
        axes.figure.draw_without_rendering()
        assert axes.yaxis.get_offset_text().get_text() == ""
    figure = figure_of(curvature_over_steps, records(curvature()))
    assert [axes.get_yscale() for axes in figure.axes] == ["linear", "linear"], "it falls below 0"
    assert not figure.legends


def test_paths_and_barriers_are_told_apart() -> None:
    table = interpolation()
    native = table[table["subject"] == "consecutive"].assign(space="native", loss=1e6)
    figure = figure_of(interpolation_paths, pd.concat([native, table]))
    assert len(panel(figure, "Neighbouring checkpoints").get_lines()) == 2
    (last,) = {line.get_ydata().max() for line in panel(figure, "To other methods, step 20").get_lines()}
    assert last == pytest.approx(4 + 20 / 4)
    assert legend(figure) == ["a", "b"]
    figure = figure_of(barriers_over_steps, records([*barriers(peers=["a"]), *barriers(peers=["b"])]))
    assert legend(figure) == ["a (other seed)", "b (other seed)", "after aligning units and heads"]


def test_barrier_map_is_symmetric_and_grouped_by_method() -> None:
    figure = figure_of(barrier_map, between_runs(aligned=(False,)))
    (axes, _) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a0", "a1", "b0"]
    shown = np.ma.filled(axes.images[0].get_array(), np.nan)
    assert shown == pytest.approx(np.array([[np.nan, 4, 2], [4, np.nan, 5], [2, 5, np.nan]]), nan_ok=True)
    assert sorted(text.get_text() for text in axes.texts) == ["2.00", "2.00", "4.00", "4.00", "5.00", "5.00"]
    assert legend(figure) == ["not measured"]


def test_barrier_map_shows_each_pair_at_its_own_last_step() -> None:
    table = between_runs(aligned=(False,))
    earlier = table.assign(step=50, barrier=9.0)
    shorter = table["run_b"] == "a1"
    figure = figure_of(barrier_map, pd.concat([table[~shorter], earlier], ignore_index=True))
    assert sorted({text.get_text() for text in figure.axes[0].texts}) == ["2.00", "9.00"]
    assert figure.get_suptitle().endswith("at each pair's last step, 50 to 100")


def test_similarity_names_its_baseline() -> None:
    table = activation()
    figure = figure_of(similarity_over_depth, table)
    assert legend(figure) == ["step 0", "step 50", "step 100", "debiased CKA"]
    assert "compared with fullrank at the same step" in figure.get_suptitle()
    two = pd.concat([table.assign(baseline_step=100), activation(baseline="other")])
    title = figure_of(similarity_over_steps, two).get_suptitle()
    assert title.endswith("compared with fullrank at step 100, the first of 2 baselines")
    title = figure_of(similarity_over_depth, table.assign(baseline="", baseline_step=-1)).get_suptitle()
    assert title.endswith("compared with the baseline")
