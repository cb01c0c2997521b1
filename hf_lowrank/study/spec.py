"""The YAML file of a study, read strictly: what is unknown or makes no sense is refused by name."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from hf_lowrank.options import nearest
from hf_lowrank.report.catalogue import CATALOGUE

__all__ = ["Barriers", "Method", "Metrics", "Study", "Tasks", "Tuning", "read_study"]

# flags of the recipe on which the study decides, and the key of the study that does it
DECIDED = {
    "seed": "seeds", "data_seed": "seeds", "max_steps": "steps", "num_train_epochs": "steps", "model_size": "sizes",
    "method": "methods", "metrics": "metrics", "save_steps": "checkpoints", "save_strategy": "checkpoints",
    "save_total_limit": "checkpoints", "eval_steps": "checkpoints", "eval_strategy": "checkpoints",
    "output_dir": "the command's --output", "run_name": "the study itself", "data_cache": "the study itself",
    "resume_from_checkpoint": "the study itself", "overwrite": "the study itself",
    "push_to_hub": "`hf-lowrank push` afterwards",
}  # fmt: skip


def _checked_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise ValueError(f"{name!r} becomes a folder's name: take letters, digits, dots and hyphens")
    return name


def _checked_settings(settings: dict[str, Any]) -> dict[str, Any]:
    for key in settings:
        if key in DECIDED:
            raise ValueError(f"{key} is no setting of a method here: {DECIDED[key]} decides it")
    return settings


def _distinct(values: list[Any]) -> list[Any]:
    repeated = next((value for value in values if values.count(value) > 1), None)
    if repeated is not None:
        raise ValueError(f"{repeated!r} stands there twice: drop one")
    return values


Name = Annotated[str, AfterValidator(_checked_name)]
Settings = Annotated[dict[str, Any], AfterValidator(_checked_settings)]
# YAML reads 1e-3 as a word
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=False)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]
Checkpoints = Literal["all", "last"] | Annotated[list[Count], Field(min_length=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Method(_Part):
    """A method or a control of the study.

    Attributes:
        recipe: file of `configs/<size>/`, without its suffix; default: the method's name in the study.
        settings: flags of the recipe, for all sizes.
        sizes: further flags by size.
        rates_of: method whose pair of learning rates this one takes.
        seeds: that it is trained with; default: the study's.
    """

    recipe: str | None = None
    settings: Settings = {}
    sizes: dict[str, Settings] = {}
    rates_of: str | None = None
    seeds: Annotated[list[Seed], Field(min_length=1), AfterValidator(_distinct)] | None = None


class Tuning(_Part):
    """How learning rates are found (`hf_lowrank.study.search.RULE`), by the validation loss after all steps.

    Attributes:
        size: of the model that is tuned.
        seed: that no run of the study uses.
        starts: by method, the rates of the targets and of everything else where its search starts.
        ratio: of neighbouring rates.
        limit: points of a search, at most.
        carried_to: the other sizes that take the rates over; default: all.
        results: file of finished runs, one JSON object a line, as recipes/benchmarks/rates.py writes it.
    """

    size: str
    seed: Seed = 0
    starts: dict[str, Annotated[list[Rate], Field(min_length=2, max_length=2)]]
    ratio: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 3.0
    limit: Count = 25
    carried_to: list[str] | None = None
    results: str | None = None


class Metrics(_Part):
    """What `hf-lowrank measure` measures, and over which checkpoints.

    Attributes:
        only: families; default: all.
    """

    preset: Literal["quick", "study"] = "quick"
    only: list[str] | None = None
    sequences: Count | None = None
    checkpoints: Checkpoints = "all"


class Tasks(_Part):
    """Downstream tasks, as `hf-lowrank evaluate` takes them."""

    tasks: Annotated[list[str], Field(min_length=1)]
    checkpoints: Checkpoints = "last"
    limit: Annotated[float, Field(gt=0)] | None = None
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    seeds: list[Seed] | None = None


class Barriers(_Part):
    """Barriers between the last checkpoints of runs.

    Attributes:
        methods: between all pairs of these methods, by seed.
        seeds: between all seeds of each of these methods.
        sizes: default: all.
    """

    methods: Annotated[list[str], AfterValidator(_distinct)] = []
    seeds: Annotated[list[str], AfterValidator(_distinct)] = []
    sizes: list[str] | None = None


class Study(_Part):
    """A study: every method and control, at every size, with every seed.

    Attributes:
        reference: method with whose run of the same seed all others are compared.
        steps: optimizer steps, by size if it is a mapping.
        checkpoints: of a run, evenly spaced; the last one is at its last step.
        settings: flags of the recipe for every run.
        processes: of one training or measurement, through `accelerate launch`.
        slurm: parameters of submitit's executor, `timeout_min` or `slurm_partition` for example, and the GPUs of a
            job: `slurm_gpus_per_node`.
        recipes: folder of pretrain.py and configs/, from the YAML file's folder.
    """

    title: str
    reference: str = "fullrank"
    sizes: Annotated[list[str], Field(min_length=1), AfterValidator(_distinct)]
    seeds: Annotated[list[Seed], Field(min_length=1), AfterValidator(_distinct)]
    steps: Count | dict[str, Count]
    checkpoints: Count = 4
    settings: Settings = {}
    methods: Annotated[dict[Name, Method | None], Field(min_length=1)]
    controls: dict[Name, Method | None] = {}
    tuning: Tuning | None = None
    metrics: Metrics | None = Metrics()
    downstream: Tasks | None = None
    barriers: Barriers | None = None
    processes: Count = 1
    slurm: dict[str, Any] = {}
    recipes: str = ".."

    def method(self, label: str) -> Method:
        """A method or control by its name in the study."""
        return {**self.methods, **self.controls}[label] or Method()

    @property
    def labels(self) -> list[str]:
        """The names of methods and controls, the reference first: the others are compared with it."""
        names = [*self.methods, *self.controls]
        return sorted(names, key=lambda name: name != self.reference)

    def recipe(self, label: str) -> str:
        """Name of a method's recipe."""
        return self.method(label).recipe or label

    def steps_at(self, size: str) -> int:
        """Optimizer steps of a run of a size."""
        return self.steps if isinstance(self.steps, int) else self.steps[size]

    def saved_steps(self, size: str) -> list[int]:
        """Steps of the checkpoints of a run of a size."""
        every = self.steps_at(size) // self.checkpoints
        return [every * number for number in range(1, self.checkpoints + 1)]

    def tuned_sizes(self) -> list[str]:
        """The sizes that train at tuned rates."""
        if self.tuning is None:
            return []
        carried = self.sizes if self.tuning.carried_to is None else self.tuning.carried_to
        return list(dict.fromkeys([self.tuning.size, *carried]))

    @model_validator(mode="after")
    def _fits_together(self) -> "Study":
        _check_names(self)
        _check_families(self)
        _check_steps(self)
        _check_rates(self)
        if self.tuning is not None:
            used = {seed for label in self.labels for seed in self.method(label).seeds or self.seeds}
            if self.tuning.seed in used:
                raise ValueError(f"tuning.seed {self.tuning.seed} is a seed of the study: take one that no run uses")
        return self


def _check_names(study: Study) -> None:
    if both := study.methods.keys() & study.controls.keys():
        raise ValueError(f"controls.{min(both)}: a method has this name: give the control another")
    labels, barriers, tuning = study.labels, study.barriers or Barriers(), study.tuning
    named = {
        "reference": [study.reference],
        "barriers.methods": barriers.methods,
        "barriers.seeds": barriers.seeds,
        "tuning.starts": [] if tuning is None else list(tuning.starts),
    }
    sizes = {
        "barriers.sizes": barriers.sizes or [],
        "tuning.size": [] if tuning is None else [tuning.size],
        "tuning.carried_to": [] if tuning is None else tuning.carried_to or [],
        "steps": [] if isinstance(study.steps, int) else list(study.steps),
    }
    for label in labels:
        method = study.method(label)
        named[f"rates_of of {label}"] = [] if method.rates_of is None else [method.rates_of]
        sizes[f"sizes of {label}"] = list(method.sizes)
    for key, names in named.items():
        _check_known(key, names, labels, "methods and controls")
    for key, names in sizes.items():
        _check_known(key, names, study.sizes, "sizes")


def _check_known(key: str, names: Iterable[str], known: list[str], what: str) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{key}: {name}{nearest(name, known)} is none of the {what} {', '.join(known)}")


def _check_families(study: Study) -> None:
    known = [entry.name for entry in CATALOGUE]
    _check_known("metrics.only", [] if study.metrics is None else study.metrics.only or [], known, "families")


def _check_steps(study: Study) -> None:
    for size in study.sizes:
        if not isinstance(study.steps, int) and size not in study.steps:
            raise ValueError(f"steps: there is none for the size {size}: give {size}: 1000, say")
        if study.steps_at(size) % study.checkpoints:
            raise ValueError(
                f"checkpoints: {study.checkpoints} do not divide the {study.steps_at(size)} steps of {size} evenly"
            )
        for key, part in (("metrics", study.metrics), ("downstream", study.downstream)):
            wanted = [] if part is None or isinstance(part.checkpoints, str) else part.checkpoints
            if missing := sorted(set(wanted) - set(study.saved_steps(size))):
                raise ValueError(
                    f"{key}.checkpoints: {size} has no checkpoint at step {missing[0]}, but at "
                    f"{', '.join(map(str, study.saved_steps(size)))}"
                )


def _check_rates(study: Study) -> None:
    starts = {} if study.tuning is None else study.tuning.starts
    for label in study.labels:
        method = study.method(label)
        given = [key for key in ("learning_rate", "other_lr_scale") if _gives(method, key)]
        sources = [f"settings.{key}" for key in given[:1]] + ["rates_of"] * (method.rates_of is not None)
        sources += ["tuning.starts"] * (label in starts)
        if len(sources) > 1:
            raise ValueError(f"{label}: both {sources[0]} and {sources[1]} decide on its learning rates: drop one")
        if method.rates_of is not None and study.method(method.rates_of).rates_of is not None:
            raise ValueError(f"rates_of of {label}: {method.rates_of} takes its rates from another itself: name that")


def _gives(method: Method, key: str) -> bool:
    return any(key in settings for settings in (method.settings, *method.sizes.values()))


def read_study(path: Path) -> Study:
    """Read a study's YAML file.

    Raises:
        ValueError: there is no such file, a key is unknown, or a value makes no sense; the message is one line.
    """
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; recipes/studies/ has examples")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a study is a mapping of names to values; recipes/studies/ has examples")
    try:
        return Study.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{path}: {_one_line(error)}") from None


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice: YAML's reader would keep the last one in silence."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value]
        if repeated := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.YAMLError(f"the key {repeated} stands twice in one mapping, {node.start_mark}")
        return super().construct_mapping(node, deep)


def _one_line(error: ValidationError) -> str:
    """The first problem: where it is, what it is, what would be right."""
    problem = error.errors(include_url=False)[0]
    # pydantic names the branch of a union as well
    place = [str(part) for part in problem["loc"] if not re.search(r"[\[\]]", str(part))]
    if problem["type"] == "extra_forbidden":
        known = _known_keys(place[:-1])
        more = f": the keys are {', '.join(known)}" if known else ""
        return f"unknown key '{'.'.join(place)}'{nearest(place[-1], known)}{more}"
    if problem["type"] == "missing":
        return f"'{'.'.join(place)}' is missing"
    message = problem["msg"].removeprefix("Value error, ")
    value = "" if problem["type"] == "value_error" else f"={problem['input']!r}"
    return f"{'.'.join(place)}{value}: {message}" if place else message


def _known_keys(place: list[str]) -> list[str]:
    """The keys of the part of the file at a place."""
    parts: dict[str, type[_Part]] = {
        "methods": Method, "controls": Method, "tuning": Tuning, "metrics": Metrics, "downstream": Tasks,
        "barriers": Barriers,
    }  # fmt: skip
    part = parts.get(place[0], Study) if place else Study
    return list(part.model_fields)
