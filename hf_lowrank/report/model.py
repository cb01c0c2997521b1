"""report.json as types: what one training run was, what it was trained on and what was measured.

`Report` and its parts are strict pydantic models with attributes (`report.run.steps`). They are mappings as well, so
`report["run"]["steps"]`, `report.get("baseline")`, `"source" in data` and `{**entry}` work as they do on the JSON: a
mapping holds the fields that were given, and attributes of the others have their defaults. Unknown quantities are
null, which differs from zero; NaN and infinity are refused, because JSON has neither. `schema.json` beside this file
is exported from these models (`json_schema`).

A number has three sets of settings. `settings` define it: two numbers compare only if these agree. `reference` is
what it refers to at its own step, such as the step before: it separates the columns of a table, but not the points of
a curve. `about` only describes, and decides nothing.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal
from urllib.parse import quote

from pydantic import Field
from pydantic.json_schema import GenerateJsonSchema

from hf_lowrank.report.part import (
    Closed,
    Count,
    InitFrom,
    LearningRateSchedule,
    Name,
    Nonnegative,
    OptimizerStateBytes,
    Part,
    PeakMemory,
    Positive,
    Seeds,
    Speed,
)

__all__ = [
    "SCHEMA_VERSION", "Baseline", "BaselineDifference", "Batch", "BestOf", "CheckpointOf", "Data", "EvaluationEntry",
    "LearningRateSchedule", "MetricEntry", "Model", "Optimizer", "OptimizerStateBytes", "Paper", "Part", "PeakMemory",
    "Report", "Run", "Seeds", "Space", "Speed", "details", "json_schema",
]  # fmt: skip

SCHEMA_VERSION = 2

Space = Literal["native", "dense", "linearised"]


class Paper(Closed):
    """The paper that introduced a method.

    Attributes:
        arxiv: its number on arXiv, for example 2403.03507; None if it is not there.
        authors: separated by commas.
        url, year: where else it is to be read, and since when.
    """

    title: Name
    arxiv: Name | None
    authors: Name
    url: Name | None = None
    year: int | None = None

    @property
    def address(self) -> str:
        """Where the paper is to be read; empty if that is not known."""
        if self.arxiv:
            return f"https://arxiv.org/abs/{quote(self.arxiv)}"
        # what it holds becomes a link, where a bracket would end it
        return quote(self.url, safe=":/?=&") if self.url and self.url.startswith("https://") else ""


class Model(Part):
    """The model that was trained.

    Attributes:
        architecture: the model type of the base model, such as llama.
        parameters: all parameters of the model as trained, tied ones once.
        loaded_by: the class of transformers that loads the published weights, null if none does; reports of older
            versions leave it out, and are of causal language models.
    """

    architecture: Name
    size: str | None
    parameters: Count
    parameters_trained: Count
    config_hash: str | None = None
    loaded_by: str | None = "AutoModelForCausalLM"


class Optimizer(Part):
    """The optimizer that ran, with the settings of its first group.

    Attributes:
        other_lr_scale: learning rate outside of the targets over the targets'; null if the optimizer's groups have
            several rates that no method gave them.
    """

    name: str | None
    betas: list[float] | None
    eps: float | None
    weight_decay: float | None
    max_grad_norm: float | None
    other_lr_scale: Nonnegative | None = None


class Batch(Part):
    """What one optimizer step is over.

    Attributes:
        global_sequences: sequences in one optimizer step.
    """

    per_device: Positive | None
    gradient_accumulation: Positive | None
    world_size: Positive | None
    global_sequences: Positive | None


class CheckpointOf(Closed):
    """The run that a checkpoint belongs to.

    Attributes:
        steps: optimizer steps that the run had done when this report was cut for its checkpoint; null if the report
            was written at a save, while training went on.
    """

    steps: Count | None


class BestOf(Closed):
    """How the step was chosen whose model a report is of.

    Attributes:
        steps: optimizer steps that the run did in all.
        metric: decided which step is the best, such as eval_loss.
        value: of that metric at the best step.
    """

    steps: Count
    metric: Name
    value: float | None = None


def _steps_done(run: "Run | Baseline") -> int:
    """Optimizer steps of the whole run, whichever its model is of."""
    return run.steps if run.best_of is None else run.best_of.steps


def _stopped_early(run: "Run | Baseline") -> bool:
    """Whether training ended before its planned last step.

    A checkpoint (`checkpoint_of`) has fewer steps than its run because the run went on.
    """
    return run.max_steps is not None and run.steps_done < run.max_steps and run.checkpoint_of is None


class Coverage(Part):
    """What a method covers, in shares of the dense model's parameters.

    Attributes:
        targets: of the matrices that the method projects or replaces.
        blocks: of the repeated blocks.
        not_covered: matrices in the blocks that train full-rank, by name.
    """

    targets: Nonnegative
    blocks: Nonnegative
    not_covered: dict[str, Nonnegative]


class Run(Part):
    """What the training run was; further facts are welcome.

    Attributes:
        method_label: the method's name for people.
        dense_form: whether dense weights compute the same function; null if that is not known.
        method_config: the method's configuration, field by field.
        coverage: null for a method without ranks.
        steps: optimizer steps that the model has done.
        max_steps: optimizer steps planned.
        checkpoint_of: set if this is the report of a checkpoint (a `step-<n>` tag) of a run that went on after
            `steps`.
        learning_rate: peak learning rate, of the targets if they have another than the other parameters.
        best_of: set if the weights and numbers are of the best step and not of the last (`load_best_model_at_end`).
        init_from: set if the run started from another one's weights.
        weights_published: whether the weights are beside the report; null if that is not known.
        command: the command that repeats the run, one argument an item.
        speed: null in reports of older versions.
        date: when the run ended, ISO 8601.
    """

    name: Name
    method: Name
    method_label: str | None = None
    method_paper: Paper | None = None
    dense_form: bool | None = None
    method_config: dict[str, Any]
    coverage: Coverage | None = None
    model: Model
    optimizer_state_bytes: OptimizerStateBytes
    peak_memory_bytes: PeakMemory
    tokens_seen: Count | None
    flops: Nonnegative | None
    steps: Count
    max_steps: Count | None
    checkpoint_of: CheckpointOf | None = None
    best_of: BestOf | None = None
    init_from: InitFrom | None = None
    weights_published: bool | None = None
    seeds: Seeds
    learning_rate: Nonnegative | None
    lr_schedule: LearningRateSchedule
    optimizer: Optimizer
    batch: Batch
    precision: str | None
    world_size: Positive | None
    versions: dict[str, str | None]
    git_commit: str | None
    hardware: str | dict[str, Any] | None
    wall_time_seconds: Nonnegative | None
    speed: Speed | None = None
    command: list[str] | None
    license: str | None
    date: str | None

    steps_done = property(_steps_done)
    stopped_early = property(_stopped_early)

    def last_step(self) -> int | None:
        """The step beyond which numbers are not of this model but of a later one; None if there is none."""
        return None if self.best_of is None else self.steps


class Data(Part):
    """What the run was trained and validated on; null if it is not known, as in a foreign Trainer run.

    Attributes:
        source: where to look the name up: the Hub's data sets, the machine's files, or the package's embedded corpus.
    """

    source: Literal["hub", "local", "embedded"] | None = None
    name: Name
    config: str | None
    revision_or_hash: str | None
    tokenizer_hash: str | None
    tokenizer_name: str | None
    sequence_length: Positive | None
    packing: bool | str | None
    train_sequences: Count | None
    validation_sequences: Count | None
    validation_tokens: Count | None
    split_seed: int | None


class MetricEntry(Closed):
    """One number of a metric.

    Attributes:
        name: dimension/subject/metric.
        value: null if it could not be measured; about.note says why.
        settings: what defines the number: numbers compare only if these agree.
        space: which weights were looked at: the parameters as trained, the dense matrices they compute, or the product
            of the factors if no dense matrix exists; null if the question does not arise.
        reference: what the number refers to at its own step, such as the step before.
        about: what only describes the number, such as how many matrices it is over.
    """

    name: Name
    value: float | None
    stderr: Nonnegative | None
    step: Count | None
    settings: dict[str, Any]
    space: Space | None
    reference: dict[str, Any] = Field({})
    about: dict[str, Any] = Field({})


class EvaluationEntry(Closed):
    """One number of a downstream task.

    Attributes:
        settings: what defines the number beside the fields above: seeds and samples.
        about: what only describes the number: form of the weights, truncated requests, chance level.
    """

    task: Name
    metric: Name
    value: float | None
    stderr: Nonnegative | None
    num_fewshot: Count | None
    limit: Annotated[int | float, Field(ge=0)] | None
    step: Count | None
    task_version: str | int | float | None
    settings: dict[str, Any] = Field({})
    about: dict[str, Any] = Field({})


class BaselineDifference(Closed):
    """A number of the run minus its baseline's, both measured in the same way.

    Attributes:
        name, space, settings, reference: which number; the name of a downstream result is `task/metric`.
        value, baseline: the numbers of the two from which it was taken.
        difference, stderr: of the two; the error is null if nothing is known of one of them.
        dof: degrees of freedom of the test; null for the normal distribution or an exact test.
        p: two-sided, not corrected for the number of tests; null if nothing was tested.
        test: for people, such as `paired over 128 sequences`; null if nothing was tested, and `why` says why.
        paired: whether the two were compared unit by unit; otherwise the error is as if they were independent.
    """

    name: Name
    space: Space | None = None
    settings: dict[str, Any]
    reference: dict[str, Any] = Field({})
    value: float
    baseline: float
    difference: float
    stderr: Nonnegative | None
    dof: Nonnegative | None
    p: Annotated[float, Field(ge=0, le=1)] | None
    test: str | None
    paired: bool
    why: str | None = None


class Baseline(Closed):
    """What is known of the run that this one was measured against: enough to tell whether the two compare.

    Fields with a default are not in the reports of older versions.

    Attributes:
        optimizer_state_bytes: measured, or else predicted.
        differences: of the numbers that both have measured in the same way, run minus baseline.
    """

    name: Name
    method: Name
    method_label: str | None = None
    model: Model | None = None
    steps: Count
    max_steps: Count | None = None
    checkpoint_of: CheckpointOf | None = None
    best_of: BestOf | None = None
    init_from: InitFrom | None = None
    tokens_seen: Count | None
    parameters: Count
    optimizer_state_bytes: Count | None
    learning_rate: Nonnegative | None
    lr_schedule: LearningRateSchedule | None = None
    optimizer: Optimizer | None = None
    batch: Batch | None = None
    precision: str | None = None
    versions: dict[str, str | None] | None = None
    hardware: str | dict[str, Any] | None = None
    data: Data | None
    metrics: list[MetricEntry]
    evaluations: list[EvaluationEntry]
    differences: list[BaselineDifference] = Field([])

    steps_done = property(_steps_done)
    stopped_early = property(_stopped_early)


class Report(Closed):
    """What one training run was, what it was trained on and what was measured.

    Unknown quantities are null; NaN and infinity are not allowed.
    """

    schema_version: Literal[2]
    run: Run
    data: Data | None
    metrics: list[MetricEntry]
    evaluations: list[EvaluationEntry]
    baseline: Baseline | None = None


def details(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything that a report says about how a number was measured, to show it.

    The degrees of freedom (`dof`) belong to the error and are left out.
    """
    parts = ("settings", "reference", "about")
    return {key: value for part in parts for key, value in (entry.get(part) or {}).items() if key != "dof"}


class _WithoutTitles(GenerateJsonSchema):
    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of report.json, which `schema.json` in this folder holds."""
    exported = Report.model_json_schema(schema_generator=_WithoutTitles)
    return {"$schema": GenerateJsonSchema.schema_dialect, "$id": f"urn:hf_lowrank:report:{SCHEMA_VERSION}", **exported}


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=2, ensure_ascii=False))
