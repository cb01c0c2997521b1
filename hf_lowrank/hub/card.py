"""The model card of a run: what it collects from a report, its metadata, and its Markdown.

Collecting (`CardData.from_report`), rendering (`render_card`, pure) and writing (`write_card`) are apart, so that a
stored report can be rendered again at any time. Whatever the template prints is escaped unless it is `Markdown`.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from jinja2 import Environment, PackageLoader, StrictUndefined

from hf_lowrank.hub.benchmarks import write_benchmarks
from hf_lowrank.hub.card_metadata import card_metadata, evaluation_results, headline_results
from hf_lowrank.report.baseline import Pair, beside_baseline
from hf_lowrank.report.catalogue import entries
from hf_lowrank.report.comparability import Difference, differences
from hf_lowrank.report.files import atomic_path
from hf_lowrank.report.io import read_report, validate_report
from hf_lowrank.report.markdown import Markdown, code, escape, fenced, one_line, slug
from hf_lowrank.report.model import Report
from hf_lowrank.report.tables import (
    UNKNOWN,
    Fact,
    HeadlineRow,
    describe,
    evaluation_rows,
    evaluation_settings,
    fact_rows,
    format_bytes,
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
    authors: str

    @property
    def url(self) -> str:
        return f"https://arxiv.org/abs/{self.arxiv}"

    def bibtex(self, key: str) -> str:
        """Return the paper as a BibTeX entry under `key`."""
        return (
            f"@misc{{{key},\n"
            f"  title         = {{{self.title}}},\n"
            f"  author        = {{{self.authors.replace(', ', ' and ')}}},\n"
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


STUDY = Paper(
    "Beyond Perplexity: A Geometric and Spectral Study of Low-Rank Pre-Training",
    "2605.13652",
    "Namrata Shivagunde, Vijeta Deshpande, Sherin Muckatira, Anna Rumshisky",
)
GALORE = Paper(
    "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection",
    "2403.03507",
    "Jiawei Zhao, Zhenyu Zhang, Beidi Chen, Zhangyang Wang, Anima Anandkumar, Yuandong Tian",
)
FIRA = Paper(
    "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?",
    "2410.01623",
    "Xi Chen, Kaituo Feng, Changsheng Li, Xunhao Lai, Xiangyu Yue, Ye Yuan, Guoren Wang",
)
APOLLO = Paper(
    "APOLLO: SGD-like Memory, AdamW-level Performance",
    "2412.05270",
    "Hanqing Zhu, Zhenyu Zhang, Wenyan Cong, Xi Liu, Sem Park, Vikas Chandra, Bo Long, David Z. Pan, Zhangyang Wang, "
    "Jinwon Lee",
)
COLA = Paper(
    "CoLA: Compute-Efficient Pre-Training of LLMs via Low-Rank Activation",
    "2502.10940",
    "Ziyue Liu, Ruijie Zhang, Zhengyang Wang, Mingsong Yan, Zi Yang, Paul D. Hovland, Bogdan Nicolae, "
    "Franck Cappello, Sui Tang, Zheng Zhang",
)
SLTRAIN = Paper(
    "SLTrain: a sparse plus low-rank approach for parameter and memory efficient pretraining",
    "2406.02214",
    "Andi Han, Jiaxiang Li, Wei Huang, Mingyi Hong, Akiko Takeda, Pratik Jawanpuria, Bamdev Mishra",
)
LORA = Paper(
    "LoRA: Low-Rank Adaptation of Large Language Models",
    "2106.09685",
    "Edward J. Hu, Yelong Shen, Phillip Wallis, Zeyuan Allen-Zhu, Yuanzhi Li, Shean Wang, Lu Wang, Weizhu Chen",
)
RELORA = Paper(
    "ReLoRA: High-Rank Training Through Low-Rank Updates",
    "2307.05695",
    "Vladislav Lialin, Namrata Shivagunde, Sherin Muckatira, Anna Rumshisky",
)

METHODS: Mapping[str, MethodInfo] = {
    "fullrank": MethodInfo("full-rank training"),
    "galore": MethodInfo("GaLore", GALORE),
    "fira": MethodInfo("Fira", FIRA),
    "apollo": MethodInfo("APOLLO", APOLLO),
    "cola": MethodInfo("CoLA", COLA, dense=False),
    "sltrain": MethodInfo("SLTrain", SLTRAIN),
    "lora": MethodInfo("LoRA", LORA),
    "relora": MethodInfo("ReLoRA", RELORA),
}


@dataclass(frozen=True)
class Baseline:
    """The run that this one was measured against.

    Attributes:
        name, method, facts: what it was.
        rows: numbers of the two that compare.
        conflicts: in what they differ so that their numbers are not of the same thing.
        notes: in what else they differ.
    """

    name: str
    method: str
    facts: Sequence[str]
    rows: Sequence[Pair]
    conflicts: Sequence[str]
    notes: Sequence[str]


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
    baseline: Baseline | None = None
    figures: Sequence[tuple[str, str]] = ()
    command: Sequence[str] | None = None
    has_tokenizer: bool = False
    prompt: str = "Once upon a time"
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
        report = validate_report(report)
        run, data = report.run, report.data
        if repo_id is not None:
            try:
                validate_repo_id(repo_id)
            except HFValidationError as error:
                raise ValueError(f"repo_id {repo_id!r} is not a Hub repository's name: {error}") from error
        headline, evaluations = headline_rows(report), evaluation_rows(report)
        return cls(
            name=one_line(run["name"]) or "unnamed run",
            method=run["method"],
            method_info=METHODS.get(run["method"], MethodInfo(run["method"])),
            repo_id=repo_id or f"user/{slug(run['name'])}",
            published=repo_id is not None,
            headline=headline,
            facts=fact_rows(report),
            limits=_limits(report, headline),
            evaluations=evaluations,
            baseline=_baseline(report),
            figures=_captioned(figures),
            command=run["command"],
            has_tokenizer=data is not None and data["tokenizer_hash"] is not None,
            prompt="def " if data is not None and data.get("source") == "embedded" else "Once upon a time",
            metadata=card_metadata(run, data),
            eval_results=[*headline_results(headline, data), *evaluation_results(evaluations)],
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
        prompt=Markdown(json.dumps(data.prompt)),
        study=Markdown(f"[{STUDY.title}]({STUDY.url})"),
        command=None if data.command is None else fenced(shlex.join(data.command), "bash"),
        bibtex=fenced("\n\n".join(paper.bibtex(key) for key, paper in papers.items()), "bibtex"),
    )


def write_card(publish: Path | str, repo_id: str | None = None) -> Path:
    """Render the card of the run in `publish` from its report.json and figures/ into README.md; return its path.

    Results on registered benchmarks go beside it into `.eval_results/`, where the Hub's leaderboards find them. Raises
    what `read_report` raises, and `ValueError` for a `repo_id` that the Hub would refuse.
    """
    publish = Path(publish)
    report = read_report(publish / "report.json")
    figures = sorted(path.name for path in (publish / "figures").glob("*.png"))
    text = render_card(CardData.from_report(report, figures, repo_id))
    path = publish / "README.md"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    write_benchmarks(publish, report)
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
        "evaluated_with": lambda row: describe(evaluation_settings(row)),
        "or_blank": lambda value: "" if value is None else value,
        "url": lambda name: Markdown(quote(name, safe="")),
        "value": lambda row: format_value(row["value"], row["stderr"]),
    }
    return environment


def _baseline(report: Report) -> Baseline | None:
    baseline = report.baseline
    if baseline is None:
        return None
    state, rate = format_bytes(baseline.optimizer_state_bytes), baseline.learning_rate
    facts = [f"{format_count(baseline.parameters)} parameters"] if baseline.parameters else []
    facts += [f"{format_count(baseline.tokens_seen)} tokens"] if baseline.tokens_seen is not None else []
    facts += [f"peak learning rate {rate:g}"] if rate is not None else []
    facts += [f"{state} of optimizer state"] if state is not None else []
    texts: dict[str, list[str]] = {"conflict": [], "note": []}
    for difference in differences([report, baseline], reference=1):
        texts[difference.level].append(_in_words(difference))
    return Baseline(
        name=baseline.name,
        method=METHODS.get(baseline.method, MethodInfo(baseline.method)).label,
        facts=facts,
        rows=beside_baseline(report),
        conflicts=texts["conflict"],
        notes=texts["note"],
    )


def _in_words(difference: Difference) -> str:
    """Return a difference between run and baseline, `tokens seen (99 here, 10 there)`."""
    here, there = difference.words
    if UNKNOWN in (here, there):
        values = f"{UNKNOWN} for {'this run' if here == UNKNOWN else 'the baseline'}"
    else:
        values = f"{here} here, {there} there"
    return f"{difference.fact.title.lower()} ({values})"


def _captioned(figures: Sequence[str]) -> list[tuple[str, str]]:
    """Return (file name, caption), the figures that this package draws first."""
    captions = {picture.file: picture.caption for entry in entries() for picture in entry.pictures}
    others = sorted(set(figures) - captions.keys())
    return [(name, captions.get(name, Path(name).stem)) for name in [*captions, *others] if name in figures]


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
    checkpoint_of = run.get("checkpoint_of")
    if checkpoint_of and checkpoint_of["steps"] is not None:
        limits.append(f"It is the checkpoint of step {run['steps']:,}: the run went on to {checkpoint_of['steps']:,}.")
    elif checkpoint_of:
        limits.append(f"It was written at step {run['steps']:,} of {run['max_steps']:,}, while training went on.")
    elif run["max_steps"] is not None and run["steps"] < run["max_steps"]:
        limits.append(f"Training stopped at step {run['steps']:,} of {run['max_steps']:,}.")
    limits.append(
        "All numbers come from one run with one seed: they say nothing about the spread between seeds, and standard "
        "errors cover the measurement only."
    )
    if not report["evaluations"]:
        limits.append("It was not evaluated on downstream tasks.")
    elif any(entry["limit"] is not None for entry in evaluation_rows(report)):
        limits.append("Downstream results with a limit are of the first items of a task alone.")
    for row in headline:
        if row.value is None:
            note = row.settings.get("note")
            limits.append(f"{row.label} could not be measured{f' ({note})' if note else ''}.")
    return limits
