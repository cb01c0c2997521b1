"""Runs at one place in training: at a validation loss, at the worst of their final ones, at a step or after tokens.

What differs between methods when the loss does not? A run is taken at the first place where its validation loss, over
its checkpoints, comes down to the given one. Between two checkpoints a and b with losses L_a > L > L_b every number is
interpolated linearly in the loss: v = (1 - t) v_a + t v_b with t = (L_a - L) / (L_a - L_b). Its standard error is that
of the samples of both, interpolated, if the run keeps them; else (1 - t) s_a + t s_b, the most that two errors of any
correlation can give. What the error of the loss itself does to the place is not part of it, and is said.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from hf_lowrank.figures.tables import table_up_to
from hf_lowrank.report.comparability import EVALUATION_HASH, Number, numbers
from hf_lowrank.report.values import format_value

if TYPE_CHECKING:
    from hf_lowrank.compare.frame import ComparedRun

__all__ = ["At", "Taken", "parse_at", "take"]

_LOSS, _PERPLEXITY = "validation_loss", "perplexity"
_FORMS = "give loss=3.9, matched, step=200 or tokens=819200"
_LISTED = 8  # checkpoints in a message


@dataclass(frozen=True)
class At:
    """Where runs are taken.

    Attributes:
        kind: what is given; `matched` is the worst of the runs' final validation losses.
        value: nats a token, a step or a number of tokens; None for `matched`.
    """

    kind: Literal["loss", "matched", "step", "tokens"]
    value: float | None = None

    def __str__(self) -> str:
        return self.kind if self.value is None else f"{self.kind}={_plain(self.value)}"

    def words(self, loss: float | None = None) -> str:
        """The place for a heading; `loss` is what `matched` came to."""
        if self.kind == "matched":
            return f"the worst of their final validation losses, {_plain(loss or 0.0)}"
        named = {"loss": "validation loss {}", "step": "step {}", "tokens": "{} tokens"}[self.kind]
        return named.format(_plain(self.value or 0.0) if self.kind == "loss" else f"{int(self.value or 0):,}")


@dataclass(frozen=True)
class Taken:
    """Where a run is taken.

    Attributes:
        steps: the checkpoint, twice, or the two between which the run is taken.
        weight: how far it is from the first to the second, from 0 to 1, in loss.
        loss, stderr: the validation loss there and its standard error, if it was asked for.
        crossings: how often the run crosses the loss; it is taken at the first.
        last: the run's last step.
        tokens_per_step: None if that is not recorded.
        numbers: those that are interpolated.
        other: names of metrics that were measured on both sides and cannot be interpolated.
    """

    steps: tuple[int, int]
    weight: float = 0.0
    loss: float | None = None
    stderr: float | None = None
    crossings: int = 1
    last: int = 0
    tokens_per_step: float | None = None
    numbers: tuple[Number, ...] = ()
    other: tuple[str, ...] = ()

    @property
    def exact(self) -> int | None:
        """The checkpoint's step; None between two checkpoints."""
        return self.steps[0] if self.steps[0] == self.steps[1] else None

    @property
    def step(self) -> float:
        """How many steps it took, interpolated in the loss."""
        return (1 - self.weight) * self.steps[0] + self.weight * self.steps[1]

    @property
    def tokens(self) -> float | None:
        """How many tokens it took."""
        return None if self.tokens_per_step is None else self.step * self.tokens_per_step

    @property
    def nearer(self) -> int:
        """The nearer checkpoint's step."""
        return self.steps[self.weight > 0.5]

    @property
    def text(self) -> str:
        """The place in words."""
        if self.exact is not None:
            place = f"step {self.exact:,} " + ("(its end)" if self.exact == self.last else f"of {self.last:,}")
        else:
            place = _place(self.steps, self.weight, f" of {self.last:,}")
        loss = "" if self.loss is None else f", loss {format_value(self.loss, self.stderr)}"
        return f"{place}{loss}{f', first of {self.crossings} crossings' if self.crossings > 1 else ''}"


def parse_at(text: str) -> At:
    """Read `loss=3.9`, `matched`, `step=200` or `tokens=819200`.

    Raises:
        ValueError: it is none of these; the message says what to give.
    """
    kind, equals, given = text.strip().partition("=")
    if kind == "matched" and not equals:
        return At("matched")
    try:
        value = float(given.replace(",", ""))
    except ValueError:
        raise ValueError(f"--at {text}: {_FORMS}") from None
    if kind == "loss" and math.isfinite(value):
        return At("loss", value)
    if kind in ("step", "tokens") and math.isfinite(value) and value >= 0 and value == int(value):
        return At("step" if kind == "step" else "tokens", int(value))
    raise ValueError(f"--at {text}: {_FORMS}")


def take(runs: Sequence["ComparedRun"], at: At) -> tuple[list["ComparedRun"], str]:
    """Take every run at one place; return them, and the place in words.

    Raises:
        ValueError: a run never gets there, or has no losses by which to tell; all such runs are named.
    """
    if at.kind in ("step", "tokens"):
        places = [_at_step(run, at) for run in runs]
        words = at.words()
    else:
        losses = _shared_losses(runs, at)
        worst = max(of_run[max(of_run)].value or 0.0 for of_run in losses)
        loss = worst if at.value is None else at.value
        places = [_at_loss(run, of_run, loss) for run, of_run in zip(runs, losses, strict=True)]
        words = at.words(loss)
    refused = [f"{run.label} {place}" for run, place in zip(runs, places, strict=True) if isinstance(place, str)]
    if refused:
        raise ValueError(f"--at {at}: {'; '.join(refused)}")
    return [_cut(run, place) for run, place in zip(runs, places, strict=True) if isinstance(place, Taken)], words


def _cut(run: "ComparedRun", taken: Taken) -> "ComparedRun":
    """The run with curves that end at the checkpoint it is taken at, or at the nearer one."""
    tables = {name: table_up_to(taken.nearer, name, table) for name, table in run.tables.items()}
    return replace(run, tables=tables, taken=replace(taken, numbers=tuple(_exactly(run, n) for n in taken.numbers)))


def _exactly(run: "ComparedRun", number: Number) -> Number:
    """Return an interpolated number with the error of the interpolated samples, if the run keeps them."""
    error = run.kept.error_of(number)
    if error is None or not math.isfinite(error[0]):
        return number
    freedom = {"dof": round(error[1], 2)} if math.isfinite(error[1]) else {}
    return replace(number, stderr=error[0], about={**number.about, **freedom})


# ---- at a step ----


def _at_step(run: "ComparedRun", at: At) -> Taken | str:
    """Where a run is taken, or why it cannot be."""
    steps = sorted({number.step for number in numbers(run.report) if number.step is not None})
    facts = _facts(run)
    each: Any = facts["tokens_per_step"]
    value = int(at.value or 0)
    if at.kind == "tokens" and each is None:
        return "does not say how many tokens it has seen: take --at step="
    places = {step: step if at.kind == "step" else round(step * each) for step in steps}
    found = [step for step, place in places.items() if place == value]
    if found:
        return Taken((found[0], found[0]), **facts)
    if not steps:
        return "has no numbers at any step"
    near = min(steps, key=lambda step: (abs(places[step] - value), step))
    unit = "step" if at.kind == "step" else "tokens"
    listed = _listed([f"{place:,}" for place in places.values()])
    return f"was not measured there but at {unit} {listed} (nearest: --at {unit}={places[near]})"


def _facts(run: "ComparedRun") -> dict[str, Any]:
    ran = run.report.run
    known = ran.tokens_seen is not None and ran.steps > 0
    return {"last": ran.steps, "tokens_per_step": (ran.tokens_seen or 0) / ran.steps if known else None}


# ---- at a loss ----


def _shared_losses(runs: Sequence["ComparedRun"], at: At) -> list[dict[int, Number]]:
    """Return each run's losses by step, measured on the same rows; if there are several such, those of most steps."""
    of_runs = [_by_quantity(number for number in numbers(run.report) if number.name == _LOSS) for run in runs]
    without = [run.label for run, of_run in zip(runs, of_runs, strict=True) if not of_run]
    if without:
        raise ValueError(
            f"--at {at}: {', '.join(without)} has no validation loss at a step whose rows are recorded: "
            "hf-lowrank measure RUN --only loss measures every checkpoint"
        )
    shared = [quantity for quantity in of_runs[0] if all(quantity in of_run for of_run in of_runs)]
    if not shared:
        rows = (
            f"{run.label}: {', '.join(dict.fromkeys(_rows(found) for found in of_run.values()))}"
            for run, of_run in zip(runs, of_runs, strict=True)
        )
        raise ValueError(
            f"--at {at}: the runs' validation losses were not measured on the same rows ({'; '.join(rows)}): "
            "measure them on the same, with hf-lowrank measure RUN... --only loss"
        )
    chosen = max(shared, key=lambda quantity: min(len(of_run[quantity]) for of_run in of_runs))
    return [of_run[chosen] for of_run in of_runs]


def _by_quantity(measured: Iterable[Number]) -> dict[tuple[str, ...], dict[int, Number]]:
    """Return the numbers of each quantity by step; of two at one step the later entry counts."""
    found: dict[tuple[str, ...], dict[int, Number]] = {}
    for number in measured:
        if number.step is not None and number.value is not None and number.comparable:
            found.setdefault(number.quantity, {})[number.step] = number
    return {quantity: dict(sorted(by_step.items())) for quantity, by_step in found.items()}


def _rows(by_step: dict[int, Number]) -> str:
    settings = next(iter(by_step.values())).settings
    return f"{settings.get('sequences', 'some')} sequences, hash {str(settings.get(EVALUATION_HASH))[:12]}"


def _at_loss(run: "ComparedRun", losses: dict[int, Number], loss: float) -> Taken | str:
    """Where a run is taken, or why it cannot be."""
    steps, values = list(losses), [float(number.value or 0.0) for number in losses.values()]
    reached = _listed([f"{value:.4g} at step {step:,}" for step, value in zip(steps, values, strict=True)])
    there = next((place for place, value in enumerate(values) if value <= loss), None)
    if there is None:
        return f"never gets down to {_plain(loss)}: its validation loss is {reached}"
    exact = values[there] == loss
    if there == 0 and not exact:
        return (
            f"is below {_plain(loss)} where its validation loss was first measured ({reached}): measure earlier "
            "checkpoints, with hf-lowrank measure RUN --only loss"
        )
    ends = (steps[there if exact else there - 1], steps[there])
    below = [value <= loss for value in values]
    crossings = sum(one != other for one, other in pairwise(below))
    at_loss = _between(losses, losses, ends, loss)
    assert at_loss is not None
    weight = at_loss.parts[1][1] if at_loss.parts else 0.0
    found, other = [], []
    for by_step in _by_quantity(numbers(run.report)).values():
        number = next(iter(by_step.values()))
        if exact and ends[0] in by_step:
            continue
        if number.name == _PERPLEXITY and number.settings == at_loss.settings:
            # the exponential of one number, and not of two
            error = None if at_loss.stderr is None else math.exp(loss) * at_loss.stderr
            found.append(replace(number, step=None, value=math.exp(loss), stderr=error, entry=None))
        elif (blended := _between(by_step, losses, ends, loss)) is not None:
            # a change since another checkpoint is no point on the line between two others
            if all(part.reference == blended.reference for part, _ in blended.parts):
                found.append(blended)
            else:
                other.append(number.name)
    names = tuple(dict.fromkeys(other))
    return Taken(
        ends, weight, loss, at_loss.stderr, max(1, crossings), numbers=tuple(found), other=names, **_facts(run)
    )


def _between(
    by_step: dict[int, Number], losses: dict[int, Number], ends: tuple[int, int], loss: float
) -> Number | None:
    """Interpolate a quantity between the nearest steps on both sides at which it and the loss were measured."""
    steps = [step for step in by_step if step in losses]
    before = max((step for step in steps if step <= ends[0]), default=None)
    after = min((step for step in steps if step >= ends[1]), default=None)
    if before is None or after is None:
        return None
    one, other = by_step[before], by_step[after]
    if before == after:
        return one
    high, low = float(losses[before].value or 0.0), float(losses[after].value or 0.0)
    if not high >= loss >= low or high == low:
        return None
    weight = (high - loss) / (high - low)
    errors = [share * n.stderr for n, share in ((one, 1 - weight), (other, weight)) if n.stderr is not None]
    about = {key: value for key, value in one.about.items() if key != "note" and other.about.get(key) == value}
    elsewhere = {} if (before, after) == ends else {"note": _place((before, after), weight)}
    return replace(
        one,
        about=about | elsewhere,
        step=None,
        value=(1 - weight) * float(one.value or 0.0) + weight * float(other.value or 0.0),
        stderr=sum(errors) if len(errors) == 2 else None,
        entry=None,
        parts=((one, 1 - weight), (other, weight)),
    )


# ---- words ----


def _place(steps: tuple[int, int], weight: float, of: str = "") -> str:
    return f"between step {steps[0]:,} and {steps[1]:,}{of}, {weight:.2f} of the way in loss"


def _plain(value: float) -> str:
    return f"{value:.10g}"


def _listed(texts: Sequence[str]) -> str:
    if len(texts) > _LISTED:
        texts = [*texts[: _LISTED - 2], "...", texts[-1]]
    return ", ".join(texts)
