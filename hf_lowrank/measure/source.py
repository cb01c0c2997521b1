"""What is measured: the checkpoints of a run, wherever they lie, and the sequences it is measured on."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from huggingface_hub import HfApi, constants, scan_cache_dir
from transformers import PreTrainedModel

from hf_lowrank.checkpoints import list_checkpoints, load_model, weight_files
from hf_lowrank.data import DataArguments, DataError, load_validation
from hf_lowrank.families.records import EVALUATION
from hf_lowrank.hub.fetch import FetchError, fetch
from hf_lowrank.hub.network import FAILURES, describe_error, with_retries
from hf_lowrank.methods.recorded import RECORDED
from hf_lowrank.report.evidence import Kept
from hf_lowrank.report.io import read_report
from hf_lowrank.report.model import Report

__all__ = ["Checkpoint", "RunSource", "open_run", "open_runs", "rows_of"]


@dataclass(frozen=True)
class Checkpoint:
    """A model at a step of a run.

    Attributes:
        step: optimizer step.
        locate: gives its folder, downloading it if it is on the Hub.
    """

    step: int
    locate: Callable[[], Path]

    @cached_property
    def folder(self) -> Path:
        """Where config.json and the weights lie."""
        return self.locate()

    @property
    def trained(self) -> Path:
        """Where the model as trained lies: a published folder holds the dense form beside it."""
        native = self.folder / "native"
        return native if (native / "config.json").is_file() else self.folder

    @cached_property
    def weights(self) -> list[Path]:
        """The safetensors files of the model as trained."""
        return weight_files(self.trained)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) over the weights' bytes."""
        digest = hashlib.sha256()
        for path in self.weights:
            with path.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()

    def load(self, device: str) -> PreTrainedModel:
        """The model as trained, in eval mode; half precision is widened, which is exact, so that small steps count.

        Raises:
            CheckpointError: files are missing, cut short, or not what config.json says.
        """
        model = load_model(self.folder)
        if any(p.dtype.itemsize < torch.float32.itemsize for p in model.parameters()):
            model = model.float()
        moved: PreTrainedModel = model.to(device)  # type: ignore[arg-type]
        return moved


@dataclass
class RunSource:
    """A run that is measured.

    Attributes:
        name: of the run, as the report has it, or the folder's or repository's.
        output: folder that gets `publish/` and the state of the measurement.
        root: the run's own folder, which keeps its validation rows; None for a repository.
        snapshot: of its repository, with its report; None for a folder.
        checkpoints: by step; at least one.
        report: the run's report, None if it has none.
        config: config.json of its newest checkpoint.
    """

    name: str
    output: Path
    checkpoints: list[Checkpoint]
    report: Report | None
    config: dict[str, Any] = field(default_factory=dict)
    root: Path | None = None
    snapshot: Path | None = None

    @property
    def method(self) -> str:
        """Name of its method; a plain Trainer's run is full-rank."""
        return str((self.config.get("lowrank") or {}).get("method", "fullrank"))

    @property
    def seed(self) -> int | None:
        """The seed it was trained with, if that is known."""
        return None if self.report is None else self.report["run"]["seeds"]["seed"]

    def kept(self) -> Kept:
        """What it keeps of its measurements, those in `output` before what it came with."""
        homes = [self.snapshot, self.root, self.output]
        folders = [home / place for home in homes if home is not None for place in ("metrics", "publish/metrics")]
        return Kept.read(*dict.fromkeys(folders))

    @property
    def tokenizer(self) -> str | None:
        """Hash of its tokenizer, if that is known."""
        data = None if self.report is None else self.report["data"]
        return None if data is None else data["tokenizer_hash"]

    def has_another_tokenizer(self, other: "RunSource") -> bool:
        """Whether token ids are known to mean something else to another run."""
        return None not in (self.tokenizer, other.tokenizer) and self.tokenizer != other.tokenizer

    def settings(self) -> dict[str, Any]:
        """The method and its settings: two runs that differ in nothing but the seed share them."""
        noted = dict(self.config.get("lowrank") or {"method": "fullrank"})
        if "target_modules" in noted:
            # a config from before the setting existed is of a run at one rate
            noted.setdefault("other_lr_scale", 1.0)
        start = noted.get("init_from") or {}
        return {
            **{key: value for key, value in noted.items() if key not in (*RECORDED, "published")},
            # each seed may have started from its own
            **{f"init_from {key}": value for key, value in start.items() if key != "source"},
        }

    def check_steps(self, steps: Iterable[int]) -> None:
        """`ValueError` for a step that there is no checkpoint of."""
        for step in steps:
            if self.at(step) is None:
                known = ", ".join(str(c.step) for c in self.checkpoints)
                raise ValueError(f"{self.name} has no checkpoint of step {step}; it has {known}")

    @property
    def final(self) -> Checkpoint:
        """The checkpoint that the run's report is of: the best one where it was chosen so, the last one otherwise."""
        step = None if self.report is None else self.report.run.last_step()
        best = None if step is None else self.at(step)
        return best or self.checkpoints[-1]

    def at(self, step: int) -> Checkpoint | None:
        """The checkpoint of a step."""
        return next((c for c in self.checkpoints if c.step == step), None)


def open_runs(sources: Sequence[str], output: Path | None, token: str | None) -> list[RunSource]:
    """Find the checkpoints of several runs, as `open_run` does; `output` is for a run alone."""
    if not sources:
        raise ValueError("no run is given: give at least one")
    if output is not None and len(sources) > 1:
        raise ValueError(f"--output {output} is for one run, {len(sources)} are given: drop one of them")
    return [open_run(source, output, token) for source in sources]


def open_run(source: str, output: Path | None = None, token: str | None = None) -> RunSource:
    """Find a run's checkpoints.

    Args:
        source: a run's folder with checkpoints (ours or any Trainer's), a published or checkpoint folder, or a Hub
            repository (`user/name`), whose tags `step-<n>` are its checkpoints, or one revision (`user/name@rev`).
        output: folder for what is measured; default: the run's own, and `measured/<name>` for a repository.
        token: of the Hub.

    Raises:
        ValueError: there is no model to measure in it.
        FetchError: the repository cannot be had.
    """
    folder = Path(source)
    if folder.is_dir():
        run = _local(folder, output)
    elif source.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{source} does not exist: give a run's folder or a repository on the Hub")
    else:
        run = _on_hub(source, output, token)
    problem: Exception | None = None
    for checkpoint in reversed(run.checkpoints):
        newest = checkpoint.trained / "config.json"
        try:
            run.config = dict(json.loads(newest.read_text()))
        # cut short while it was saved: the others can be measured
        except (OSError, ValueError) as error:
            problem = problem or error
            continue
        return run
    raise ValueError(f"{source}: no config.json can be read ({problem}): it holds no checkpoint of a model")


def _local(folder: Path, output: Path | None) -> RunSource:
    checkpoints = [
        Checkpoint(int(path.name.rpartition("-")[2]), partial(Path, path)) for path in list_checkpoints(folder)
    ]
    report = _report(folder)
    root = folder
    best = None if report is None else report.run.last_step()
    removed = checkpoints and best is not None and all(c.step != best for c in checkpoints)
    if removed and (folder / "publish" / "config.json").is_file():
        # the best checkpoint is what was published
        checkpoints.append(Checkpoint(int(best or 0), partial(Path, folder / "publish")))
        checkpoints.sort(key=lambda checkpoint: checkpoint.step)
    if not checkpoints:
        named = re.fullmatch(r"checkpoint-(\d+)", folder.resolve().name)
        published = folder / "publish" if (folder / "publish" / "config.json").is_file() else folder
        if not (published / "config.json").is_file():
            raise ValueError(f"{folder} holds no checkpoint-<step> and no config.json: give a run's folder")
        step = int(named[1]) if named else 0 if report is None else int(report["run"]["steps"])
        checkpoints = [Checkpoint(step, lambda: published)]
        root = folder.parent if folder.name == "publish" else folder
    name = root.resolve().name if report is None else str(report["run"]["name"])
    # what a checkpoint's folder is given for belongs to its run
    root = root.parent if re.fullmatch(r"checkpoint-\d+", root.resolve().name) else root
    return RunSource(name, output or root, checkpoints, report, root=root)


def _tags(repo_id: str, token: str | None) -> list[str]:
    """The tags of a repository; offline, the revisions of it that are in the Hub's cache."""
    if constants.HF_HUB_OFFLINE:
        cached = scan_cache_dir(constants.HF_HUB_CACHE).repos
        return [ref for repo in cached if repo.repo_id == repo_id for ref in repo.refs]
    try:
        return [ref.name for ref in with_retries(lambda: HfApi(token=token).list_repo_refs(repo_id)).tags]
    except FAILURES as error:
        raise FetchError(f"the tags of {repo_id} cannot be read: {describe_error(error, token)}") from error


def _on_hub(source: str, output: Path | None, token: str | None) -> RunSource:
    repo_id, _, revision = source.partition("@")
    if revision:
        steps = {int(found[1]) if (found := re.fullmatch(r"step-(\d+)", revision)) else -1: revision}
    else:
        # an error here says what is wrong with the name
        fetch(repo_id, token=token, allow_patterns=["config.json", "report.json"])
        tags = _tags(repo_id, token)
        steps = {int(found[1]): tag for tag in tags if (found := re.fullmatch(r"step-(\d+)", tag))}
    # the files of a baseline by which differences to it are paired
    wanted = ["config.json", "report.json", "metrics/*.samples.parquet", "metrics/items.parquet"]
    folder = fetch(repo_id, revision=revision or None, token=token, allow_patterns=wanted)
    report = _report(folder)
    if not steps or -1 in steps:
        steps = {0 if report is None else int(report["run"]["steps"]): revision}
    checkpoints = [
        Checkpoint(step, partial(fetch, repo_id, revision=tag or None, token=token))
        for step, tag in sorted(steps.items())
    ]
    name = repo_id if report is None else str(report["run"]["name"])
    return RunSource(
        name, output or Path("measured") / repo_id.replace("/", "--"), checkpoints, report, snapshot=folder
    )


def _report(folder: Path) -> Report | None:
    try:
        report = read_report(folder)
        # one that an earlier measurement made from the checkpoints knows no more than these
        return None if report["run"].get("generated_from") == "checkpoints" else report
    except FileNotFoundError:
        return None


def rows_of(run: RunSource, data: DataArguments | None = None) -> Any:
    """The validation rows to measure a run on.

    In this order: the data asked for, the rows that the run kept (`evaluation.parquet`), the data that its report
    names.

    Args:
        run: gives tokenizer and report.
        data: what was asked for; None for the run's own.

    Raises:
        DataError: the data cannot be had; the message says how to name them.
    """
    kept = next((f / EVALUATION for f in (run.root, run.output) if f is not None and (f / EVALUATION).is_file()), None)
    if data is None and kept is not None:
        return pd.read_parquet(kept).to_dict("records")
    arguments = data if data is not None else _described(run)
    newest = run.checkpoints[-1].folder
    tokenizer = arguments.tokenizer_name or str(newest)
    if arguments.tokenizer_name is None and not list(newest.glob("tokenizer*")):
        raise DataError(f"{newest} holds no tokenizer: name the one that {run.name} was trained with")
    rows, description = load_validation(replace(arguments, tokenizer_name=tokenizer))
    _check_hash(run, description if data is None else None)
    return rows


def _described(run: RunSource) -> DataArguments:
    """The data that a run's report names."""
    data = None if run.report is None else run.report["data"]
    way_out = "name the validation data, --dataset-path for example"
    if data is None:
        raise DataError(f"what {run.name} was trained on is not recorded: {way_out}")
    common = {
        "sequence_length": data["sequence_length"],
        "packing": data["packing"] is not False,
        "split_seed": data["split_seed"] or 0,
        "max_eval_sequences": data["validation_sequences"],
    }
    if data.get("source") == "embedded":
        return DataArguments(**common)
    if data.get("source") == "hub":
        return DataArguments(dataset_name=data["name"], dataset_config_name=data["config"], **common)
    raise DataError(f"{run.name} was trained on {data['name']}, which is known by name alone here: {way_out}")


def _check_hash(run: RunSource, description: dict[str, Any] | None) -> None:
    if description is None or run.report is None:
        return
    recorded = run.report["data"]["revision_or_hash"]
    if recorded is not None and description["revision_or_hash"] not in (None, recorded):
        raise DataError(
            f"the data {description['name']} here are not those that {run.name} was validated on (another version): "
            "name the validation data, --dataset-path for example"
        )
