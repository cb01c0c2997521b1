"""The model card of a run: what it collects from a report, its metadata, and its Markdown.

Collecting (`CardData.from_report`), rendering (`render_card`, pure) and writing (`write_card`) are apart, so that a
stored report can be rendered again at any time. Whatever the template prints is escaped unless it is `Markdown`.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from jinja2 import Environment, PackageLoader, StrictUndefined

from hf_lowrank.report.files import replacing
from hf_lowrank.report.markdown import Markdown, code, escape, fenced, one_line, slug
from hf_lowrank.report.schema import read_report
from hf_lowrank.report.tables import (
    UNKNOWN,
    Fact,
    HeadlineRow,
    describe,
    fact_rows,
    format_count,
    format_value,
    headline_rows,
)

__all__ = ["METHODS", "STUDY", "CardData", "MethodInfo", "Paper", "render_card", "write_card"]


@dataclass(frozen=True)
class Paper:
    """A paper on arXiv; its first two digits are the year."""

    title: str
    arxiv: str

    @property
    def url(self) -> str:
        return f"https://arxiv.org/abs/{self.arxiv}"

    def bibtex(self, key: str) -> str:
        """Return the paper as a BibTeX entry under `key`."""
        return (
            f"@misc{{{key},\n"
            f"  title         = {{{self.title}}},\n"
            f"  year          = {{20{self.arxiv[:2]}}},\n"
            f"  eprint        = {{{self.arxiv}}},\n"
            f"  archivePrefix = {{arXiv}},\n"
            f"  url           = {{{self.url}}}\n"
            f"}}"
        )


@dataclass(frozen=True)
class MethodInfo:
    """What a card says about a method; `dense` is False where no dense weights compute the same function."""

    label: str
    paper: Paper | None = None
    dense: bool = True


STUDY = Paper("Beyond Perplexity: A Geometric and Spectral Study of Low-Rank Pre-Training", "2605.13652")

METHODS: Mapping[str, MethodInfo] = {
    "fullrank": MethodInfo("full-rank training"),
    "galore": MethodInfo(
        "GaLore", Paper("GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", "2403.03507")
    ),
    "fira": MethodInfo(
        "Fira", Paper("Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?", "2410.01623")
    ),
    "apollo": MethodInfo("APOLLO", Paper("APOLLO: SGD-like Memory, AdamW-level Performance", "2412.05270")),
    "cola": MethodInfo(
        "CoLA",
        Paper("CoLA: Compute-Efficient Pre-Training of LLMs via Low-Rank Activation", "2502.10940"),
        dense=False,
    ),
    "sltrain": MethodInfo(
        "SLTrain",
        Paper("SLTrain: a sparse plus low-rank approach for parameter and memory efficient pretraining", "2406.02214"),
    ),
    "lora": MethodInfo("LoRA", Paper("LoRA: Low-Rank Adaptation of Large Language Models", "2106.09685")),
    "relora": MethodInfo("ReLoRA", Paper("ReLoRA: High-Rank Training Through Low-Rank Updates", "2307.05695")),
}

# in the order of the card; figures of other names follow under their own name
_CAPTIONS = {
    "loss.png": "Training and validation loss",
    "landscape_curves.png": "Loss along random, singular and trajectory directions at the last measured step",
    "sharpness_over_steps.png": "Expected sharpness and loss variance over training",
    "curvature_over_steps.png": "Top eigenvalue and trace of the Hessian over training",
    "interpolation_paths.png": "Loss on straight lines to the neighbouring checkpoint and to other runs",
    "barriers_over_steps.png": "Loss barriers to the neighbouring checkpoint and to other runs over training",
    "barrier_map.png": "Loss barriers between runs, as trained and after aligning units and heads",
    "spectra_over_steps.png": "Spectral metrics over training: mean and spread over the weight matrices",
    "spectra_over_depth.png": "Spectral metrics over depth at the last measured step, by kind of module",
    "similarity_over_steps.png": "Activations compared with the baseline's over training: mean and range over layers",
    "similarity_over_depth.png": "Activations compared with the baseline's over depth",
}

# the Hub refuses other values of `license`: they go to `license_name` under `license: other`
_HUB_LICENSES = frozenset(
    [
        *("apache-2.0", "mit", "openrail", "bsd", "bsd-2-clause", "bsd-3-clause", "isc", "unlicense", "mpl-2.0"),
        *("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0"),
        *("gpl-2.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "other", "unknown"),
    ]
)


@dataclass(frozen=True)
class CardData:
    """All that a card shows. Texts are plain: `render_card` escapes them.

    `repo_id` is where the run is or will be published; `published` is False where it is only a stand-in.
    """

    name: str
    method: str
    method_info: MethodInfo
    repo_id: str
    published: bool
    headline: Sequence[HeadlineRow]
    facts: Sequence[Fact]
    limits: Sequence[str]
    evaluations: Sequence[Mapping[str, Any]] = ()
    figures: Sequence[tuple[str, str]] = ()
    command: Sequence[str] | None = None
    has_tokenizer: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict)
    eval_results: Sequence[EvalResult] = ()

    @classmethod
    def from_report(
        cls, report: Mapping[str, Any], figures: Sequence[str] = (), repo_id: str | None = None
    ) -> "CardData":
        """Collect a card's data from a valid report and the file names of its figures.

        Without `repo_id` the snippets show `user/<run's name>` and the card says so. Raises `ValueError` for a
        `repo_id` that the Hub would refuse.
        """
        run, data = report["run"], report["data"]
        if repo_id is not None:
            try:
                validate_repo_id(repo_id)
            except HFValidationError as error:
                raise ValueError(f"repo_id {repo_id!r} is not a Hub repository's name: {error}") from error
        headline = headline_rows(report)
        return cls(
            name=one_line(run["name"]) or "unnamed run",
            method=run["method"],
            method_info=METHODS.get(run["method"], MethodInfo(run["method"])),
            repo_id=repo_id or f"user/{slug(run['name'])}",
            published=repo_id is not None,
            headline=headline,
            facts=fact_rows(report),
            limits=_limits(report, headline),
            evaluations=report["evaluations"],
            figures=_captioned(figures),
            command=run["command"],
            has_tokenizer=data is not None and data["tokenizer_hash"] is not None,
            metadata=_metadata(run, data),
            eval_results=_eval_results(headline, data),
        )


def render_card(data: CardData) -> str:
    """Return the card, YAML metadata and Markdown; equal data give equal text."""
    metadata = ModelCardData(**data.metadata)
    if data.eval_results:
        metadata.model_name, metadata.eval_results = data.name, list(data.eval_results)
    paper = data.method_info.paper
    papers = {"hf_lowrank_study": STUDY} | ({slug(data.method): paper} if paper else {})
    label = escape(data.method_info.label)
    template = _environment().get_template("card.md.jinja")
    return template.render(
        card=data,
        metadata=Markdown(metadata.to_yaml()),
        method=Markdown(f"[{label}]({paper.url})") if paper else label,
        fact={fact.key: fact.text for fact in data.facts},
        known={fact.key for fact in data.facts if fact.text != UNKNOWN},
        repo=Markdown(json.dumps(data.repo_id)),
        study=Markdown(f"[{STUDY.title}]({STUDY.url})"),
        command=None if data.command is None else fenced(shlex.join(data.command), "bash"),
        bibtex=fenced("\n\n".join(paper.bibtex(key) for key, paper in papers.items()), "bibtex"),
    )


def write_card(publish: Path | str, repo_id: str | None = None) -> Path:
    """Render the card of the run in `publish` from its report.json and figures/ into README.md; return its path.

    Raises what `read_report` raises, and `ValueError` for a `repo_id` that the Hub would refuse.
    """
    publish = Path(publish)
    report = read_report(publish / "report.json")
    figures = sorted(path.name for path in (publish / "figures").glob("*.png"))
    text = render_card(CardData.from_report(report, figures, repo_id))
    path = publish / "README.md"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def _environment() -> Environment:
    # autoescape is Jinja's word for HTML; a card is Markdown, so `finalize` escapes in its place
    environment = Environment(
        loader=PackageLoader("hf_lowrank.hub", "templates"),
        undefined=StrictUndefined,
        finalize=escape,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters |= {
        "code": code,
        "describe": describe,
        "or_blank": lambda value: "" if value is None else value,
        "url": lambda name: Markdown(quote(name, safe="")),
        "value": lambda row: format_value(row["value"], row["stderr"]),
    }
    return environment


def _metadata(run: Mapping[str, Any], data: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the arguments of `ModelCardData` that do not depend on results."""
    metadata: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["hf-lowrank", f"lowrank-method:{slug(run['method'])}", slug(run["model"]["architecture"])],
    }
    if run["license"]:
        name = slug(run["license"])
        metadata["license"] = name if name in _HUB_LICENSES else "other"
        if name not in _HUB_LICENSES:
            metadata["license_name"] = name
    if _is_on_hub(data):
        assert data is not None
        metadata["datasets"] = [data["name"]]
    return metadata


def _is_on_hub(data: Mapping[str, Any] | None) -> bool:
    """Say whether the data's name is one of the Hub's: told by `source`, or else by looking like owner/name."""
    if data is None or data.get("source") not in ("hub", None):
        return False
    try:
        validate_repo_id(data["name"])
    except HFValidationError:
        return False
    if data.get("source") == "hub":
        return True
    return re.fullmatch(r"[^/]+/[^/]+", data["name"]) is not None and not Path(data["name"]).suffix


def _eval_results(headline: Sequence[HeadlineRow], data: Mapping[str, Any] | None) -> list[EvalResult]:
    """Return one result a row that has a number, each under a data-set configuration of its own.

    huggingface_hub joins results that differ in nothing but `dataset_args`, their source or their metric
    (huggingface_hub issue 4975, still in 2.4.0); the configuration is what keeps them apart.
    """
    on_hub = _is_on_hub(data)
    name = "not recorded" if data is None else one_line(data["name"])
    config = None if data is None else data["config"]
    results = []
    for row in headline:
        if row.value is None:
            continue
        space = None if row.space is None else f"{row.space} weights"
        setting = [config, row.name, space, None if row.step is None else f"step {row.step}", describe(row.settings)]
        results.append(
            EvalResult(
                task_type="text-generation",
                task_name="Text Generation",
                dataset_type=name if on_hub else slug(name),
                dataset_name=name,
                dataset_config=one_line("; ".join(part for part in setting if part)),
                dataset_revision=data["revision_or_hash"] if on_hub and data is not None else None,
                metric_type=row.name,
                metric_name=row.label if row.id is None else f"{row.id}: {row.label}",
                metric_value=row.value,
                metric_args=None if row.stderr is None else {"stderr": row.stderr},
            )
        )
    return results


def _captioned(figures: Sequence[str]) -> list[tuple[str, str]]:
    """Return (file name, caption), the figures that this package draws first."""
    known = [name for name in _CAPTIONS if name in figures]
    return [(name, _CAPTIONS.get(name, Path(name).stem)) for name in [*known, *sorted(set(figures) - set(known))]]


def _limits(report: Mapping[str, Any], headline: Sequence[HeadlineRow]) -> list[str]:
    """Return what the report's facts say about how far the model and its numbers carry, one sentence or two each."""
    run, data = report["run"], report["data"]
    limits = []
    if data is None:
        limits.append("What the model was trained on is not recorded: nothing is known about what it may have learnt.")
    else:
        limits.append(
            f"It is a base model, trained to continue text from {one_line(data['name'])} and nothing else. The run "
            "holds no instruction tuning, alignment or safety step: do not show what it writes to people unchecked."
        )
    parameters, tokens = run["model"]["parameters"], run["tokens_seen"]
    if parameters and tokens is not None:
        limits.append(
            f"It has {format_count(parameters)} parameters and saw {format_count(tokens)} tokens, "
            f"{tokens / parameters:.2g} tokens a parameter."
        )
    if run["max_steps"] is not None and run["steps"] < run["max_steps"]:
        limits.append(f"Training stopped at step {run['steps']:,} of {run['max_steps']:,}.")
    limits.append(
        "All numbers come from one run with one seed: they say nothing about the spread between seeds, and standard "
        "errors cover the measurement only."
    )
    if not report["evaluations"]:
        limits.append("It was not evaluated on downstream tasks.")
    for row in headline:
        if row.value is None:
            note = row.settings.get("note")
            limits.append(f"{row.label} could not be measured{f' ({note})' if note else ''}.")
    return limits
