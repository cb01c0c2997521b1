"""Options of recipes and commands: dataclasses in which each field with a help text is a flag.

This module imports nothing heavy, so that `hf-lowrank measure --help` answers at once.
"""

import difflib
from collections.abc import Iterable
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_lowrank.report.catalogue import CATALOGUE

if TYPE_CHECKING:
    from hf_lowrank.families.family import Preset

__all__ = [
    "CompareOptions",
    "DataArguments",
    "DataError",
    "EvaluateOptions",
    "MeasureOptions",
    "StudyOptions",
    "nearest",
    "option",
]


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` when a known name is close to `name`, otherwise an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def option(default: Any, text: str, **metadata: Any) -> Any:
    """A field that is a flag.

    Args:
        default: of the field.
        text: the flag's help.
        metadata: `least` and `choices` limit the value; `flags` are the flag's names if they are not the field's;
            `parse` turns the flag's name and the word after it into the value.
    """
    return field(default=default, metadata={"help": text, **metadata})


def _word(flag: str, text: str) -> str:
    return text


def _words(flag: str, text: str) -> tuple[str, ...]:
    """Words that stand between commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _numbers(flag: str, text: str) -> tuple[int, ...]:
    """Whole numbers that stand between commas, each once."""
    try:
        return tuple(dict.fromkeys(int(word) for word in text.split(",")))
    except ValueError:
        raise ValueError(f"{flag} {text}: give whole numbers with commas, 70,140 for example") from None


def _checkpoints(flag: str, text: str) -> str | tuple[int, ...]:
    try:
        return text if text in ("last", "all") else _numbers(flag, text)
    except ValueError:
        raise ValueError(f"{flag} {text}: give last, all or whole numbers with commas, 70,140 for example") from None


def _batch_size(flag: str, text: str) -> int | str:
    if text == "auto" or (text.isdigit() and int(text) > 0):
        return text if text == "auto" else int(text)
    raise ValueError(f"{flag} {text}: give 1 or more, or auto for what fits into the memory")


def flag_name(field: "Field[Any]") -> str:
    """The flag of a field, the first of several."""
    return (*field.metadata.get("flags", ()), f"--{field.name.replace('_', '-')}")[0]


class _Checked:
    """Refuses values outside the limits of their fields."""

    def __post_init__(self) -> None:
        for f in fields(self):  # type: ignore[arg-type]
            value, flag = getattr(self, f.name), flag_name(f)
            if value is None:
                continue
            if "least" in f.metadata and value < f.metadata["least"]:
                raise ValueError(f"{flag} {value}: give {f.metadata['least']} or more")
            if choices := f.metadata.get("choices"):
                _check_choice(flag, value, choices)


def _check_choice(flag: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ValueError(f"{flag} {value}{nearest(value, choices)}: it is one of {', '.join(choices)}")


_DEVICE = "cuda, cpu, ...; default: a GPU where there is one."
_OUTPUT = "Folder for one run's results instead of its own."


@dataclass(frozen=True)
class MeasureOptions(_Checked):
    """How runs are measured.

    Attributes:
        preset: its name, or the settings themselves.
        token: of the Hub.
    """

    families: tuple[str, ...] | None = option(
        None,
        f"Families, with commas: {','.join(entry.name for entry in CATALOGUE)}; default: all.",
        parse=_words,
        flags=("--only",),
    )
    preset: "str | Preset" = option("quick", "quick, or study: the settings of arXiv 2605.13652.", parse=_word)
    sequences: int | None = option(None, "Validation sequences; default: the preset's.", least=1)
    steps: tuple[int, ...] | None = option(None, "Checkpoints to measure, with commas; default: all.", parse=_numbers)
    batch_size: int = option(16, "Sequences in one forward pass.", least=1)
    device: str | None = option(None, _DEVICE)
    output: Path | None = option(None, _OUTPUT)
    dataset_name: str | None = option(None, "Validation data instead of the run's own: Hub data set.")
    dataset_config_name: str | None = option(None, "Its configuration.")
    dataset_path: str | None = option(None, "Validation data instead of the run's own: file or folder.")
    dataset_glob: str | None = option(None, "Files to take from the folder.")
    skip_undecodable: bool | None = option(None, "Leave out its files that are not UTF-8 text.")
    tokenizer_name: str | None = option(None, "Tokenizer; default: the run's.")
    sequence_length: int | None = option(None, "Tokens in a row of the validation data.")
    token: str | None = None

    @property
    def chosen_families(self) -> tuple[str, ...]:
        """The families of metrics to measure, the cheap ones first.

        Raises:
            ValueError: there is no such family, or none is named.
        """
        from hf_lowrank.families import families

        known = tuple(families())
        if self.families is None:
            return known
        for name in self.families:
            _check_choice("--only", name, known)
        if not self.families:
            raise ValueError(f"--only names nothing: the families are {', '.join(known)}")
        return tuple(name for name in known if name in self.families)

    @property
    def settings(self) -> "Preset":
        """The settings of every family; `ValueError` if there is no such preset."""
        from hf_lowrank.families.family import PRESETS, Preset

        if isinstance(self.preset, Preset):
            chosen = self.preset
        else:
            _check_choice("--preset", self.preset, PRESETS)
            chosen = PRESETS[self.preset]
        return chosen if self.sequences is None else replace(chosen, sequences=self.sequences)

    @property
    def data(self) -> "DataArguments | None":
        """The validation data that is named; None for the runs' own. `ValueError` where only details of it are."""
        names = {f.name for f in fields(DataArguments)}
        given = {f.name: f for f in fields(self) if f.name in names and getattr(self, f.name) is not None}
        if not given:
            return None
        if not given.keys() & {"dataset_name", "dataset_path"}:
            raise ValueError(f"{flag_name(given[min(given)])} needs --dataset-name or --dataset-path: name the data")
        return DataArguments(**{name: getattr(self, name) for name in given})


@dataclass(frozen=True)
class EvaluateOptions(_Checked):
    """How runs are evaluated on downstream tasks; None stands for a suite's own setting, or the harness's.

    Attributes:
        token: of the Hub.
    """

    tasks: tuple[str, ...] = option(
        MISSING, "With commas: lm-eval tasks, groups, tags, wildcards; study, quick.", parse=_words
    )
    checkpoints: str | tuple[int, ...] = option("last", "last, all, or steps with commas.", parse=_checkpoints)
    num_fewshot: int | None = option(None, "Examples in the prompt; default: each task's own.", least=0)
    seeds: tuple[int, ...] | None = option(None, "With commas; default: the harness's own.", parse=_numbers)
    bootstrap_iterations: int | None = option(
        None,
        "For standard errors that have no formula; default: 100000, in study 1000.",
        least=0,
        flags=("--bootstrap-iters",),
    )
    limit: float | None = option(None, "Only the first items of each task: how many, or a share below 1.")
    log_items: bool = option(
        False,
        "Keep prompt, target and answer of each item.",
        flags=("--log-items", "--log_items", "--log-samples", "--log_samples"),
    )
    include: tuple[Path, ...] = option(
        (), "Folder of own tasks; repeatable.", flags=("--include-path", "--include_path")
    )
    form: str = option("native", "native, as trained, or dense.", choices=("native", "dense"))
    dtype: str = option(
        "auto", "auto (as saved), float32, bfloat16 or float16.", choices=("auto", "float32", "bfloat16", "float16")
    )
    batch_size: int | str = option(16, "Requests in one forward pass, or auto.", parse=_batch_size)
    max_length: int | None = option(None, "Tokens of context; default: the model's.", least=1)
    device: str | None = option(None, _DEVICE)
    tokenizer: str | None = option(None, "Tokenizer; default: the run's.", flags=("--tokenizer-name",))
    cache: Path | None = option(
        None, "Folder for answers: an interrupted task continues from them.", flags=("--use-cache",)
    )
    output: Path | None = option(None, _OUTPUT)
    token: str | None = None


@dataclass(frozen=True)
class CompareOptions(_Checked):
    """Which runs are compared with which, and where the comparison goes.

    Attributes:
        token: of the Hub.
    """

    tag: str | None = option(None, "Also the runs that the Hub lists under this tag: hf-lowrank.")
    limit: int = option(20, "With --tag: how many of the newest.")
    baseline: str | None = option(None, "Run to take differences to: name or source.")
    sort: str | None = option(None, "Metric to sort by: validation_loss, H9, task/acc, ...; default: as given.")
    descending: bool = option(False, "The largest first.")
    at: str | None = option(
        None, "Take each run at loss=3.9, matched (the worst final loss), step=200 or tokens=819200."
    )
    all: bool = option(False, "Print every metric, task, cost and notice, not the headline metrics alone.")
    group_seeds: bool = option(False, "Runs that differ only in their seed as one, mean and error.")
    output: Path = option(Path("comparison"), "Folder for page, tables and figures.")
    push_to_space: str | None = option(None, "Publish the page as this Space, user/name.")
    yes: bool = option(False, "Overwrite a Space that hf-lowrank did not make.")
    token: str | None = None


@dataclass(frozen=True)
class StudyOptions(_Checked):
    """Where a study lies and how its jobs run."""

    output: Path | None = option(None, "Folder of the study; default: studies/<name of the file>.")
    dry_run: bool = option(False, "Print runs, tokens, hours and disk, from a few steps of each size, and stop.")
    jobs: int = option(1, "Jobs at a time; where there are GPUs, each has its own.", least=1)
    launcher: str = option("local", "local, or slurm: one array job a stage.", choices=("local", "slurm"))
    keep_checkpoints: bool = option(False, "Keep checkpoints that are measured; default: the reference's alone.")
    analyse: bool = option(False, "Analyse the reports in folders or Hub repos; nothing is trained.")


class DataError(ValueError):
    """The data that a user asked for are not available; the message is one line and says what to do."""


@dataclass
class DataArguments:
    """What to train on and how to cut it into rows, for `HfArgumentParser`; the defaults need no download.

    Raises `DataError` for a value that cannot work, and for two values that exclude each other.
    """

    dataset_name: str | None = option(None, "Hub data set, or a local folder laid out like one.")
    dataset_config_name: str | None = option(None, "Configuration of dataset_name.")
    dataset_path: str | None = option(
        None, "Text, JSON(L), CSV or parquet file, save_to_disk folder, or folder of files."
    )
    dataset_glob: str | None = option(None, "Files to take from the folder, at any depth (default: *.txt).")
    skip_undecodable: bool = option(
        False, "Leave out files that are not UTF-8 text and say how many, not refuse them."
    )
    text_column: str = option("text", "Column that holds the text.")
    streaming: bool = option(True, "Stream dataset_name instead of downloading it.")
    tokenizer_name: str | None = option(None, "Hub name or folder (default: trained on the training share).")
    vocab_size: int = option(4096, "Vocabulary of the tokenizer that is trained here.")
    sequence_length: int = option(256, "Tokens in a row.")
    packing: bool = option(True, "Join documents and cut rows without gaps; false: one document a row, cut or padded.")
    validation_fraction: float = option(
        0.02, "Share of the documents held out if there is no validation or test split."
    )
    max_eval_sequences: int | None = option(None, "Keep only this many validation rows, evenly spread (default: all).")
    split_seed: int = option(0, "Seed of the split into training and validation.")

    def __post_init__(self) -> None:
        name, path = self.dataset_name, self.dataset_path
        if name and path:
            raise DataError(f"dataset_name {name!r} and dataset_path {path!r} exclude each other: drop one")
        if self.dataset_config_name and not name:
            raise DataError(f"dataset_config_name {self.dataset_config_name!r} needs dataset_name: give both or none")
        if self.dataset_glob is not None and not path:
            raise DataError(f"dataset_glob {self.dataset_glob!r} needs the folder it is for: give dataset_path")
        if not 0 < self.validation_fraction <= 0.5:
            raise DataError(f"validation_fraction {self.validation_fraction} is outside (0, 0.5]: take 0.02, say")
        lowest = {"sequence_length": 2, "vocab_size": 512, "max_eval_sequences": 1, "split_seed": 0}
        for option, least in lowest.items():
            if (value := getattr(self, option)) is not None and value < least:
                raise DataError(f"{option} {value} is too small: take {least} or more")
