"""The model card of a run: what it collects from a report, and its Markdown.

Collecting (`CardData.from_report`), rendering (`render_card`, pure) and writing (`write_card`) are apart, so that a
stored report can be rendered again at any time. Whatever the template prints is escaped unless it is `Markdown`.
"""

import itertools
import json
import logging
import os
import platform
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from jinja2 import Environment, PackageLoader, StrictUndefined

from hf_lowrank.hub.glance import at_a_glance, first_figures
from hf_lowrank.hub.metadata import card_metadata, evaluation_results, headline_results, write_benchmarks
from hf_lowrank.hub.ownership import OverwriteError, is_edited, signed
from hf_lowrank.report.baseline import Pair, beside_baseline
from hf_lowrank.report.catalogue import entries
from hf_lowrank.report.comparability import Difference, differences
from hf_lowrank.report.files import atomic_path
from hf_lowrank.report.io import read_report, validate_report, write_report
from hf_lowrank.report.markdown import Markdown, code, escape, fenced, one_line, slug
from hf_lowrank.report.model import Paper, Report, Run
from hf_lowrank.report.significance import UNPAIRED
from hf_lowrank.report.tables import Fact, HeadlineRow, evaluation_rows, fact_rows, headline_rows, measured_with
from hf_lowrank.report.values import UNKNOWN, describe, format_bytes, format_count, format_value

__all__ = ["STUDY", "CardData", "render_card", "set_card_aside", "store_card", "update_card", "write_card"]

logger = logging.getLogger(__name__)

STUDY = Paper(
    title="Beyond Perplexity: A Geometric and Spectral Study of Low-Rank Pre-Training",
    arxiv="2605.13652",
    authors="Namrata Shivagunde, Vijeta Deshpande, Sherin Muckatira, Anna Rumshisky",
)


@dataclass(frozen=True)
class Baseline:
    """The run that this one was measured against.

    Attributes:
        name, method, facts: what it was.
        rows: numbers of the two that compare.
        reading: how their differences are to be read, a few sentences.
        conflicts: in what they differ so that their numbers are not of the same thing.
        notes: in what else they differ.
    """

    name: str
    method: str
    facts: Sequence[str]
    rows: Sequence[Pair]
    reading: str
    conflicts: Sequence[str]
    notes: Sequence[str]


@dataclass(frozen=True)
class CardData:
    """All that a card shows. Texts are plain: `render_card` escapes them.

    `figures` are pairs of file name and caption; without `repo_id` the run's place on the Hub is not known yet.
    """

    report: Report
    figures: Sequence[tuple[str, str]] = ()
    repo_id: str | None = None
    baseline: Baseline | None = None

    @classmethod
    def from_report(
        cls, report: Mapping[str, Any], figures: Sequence[str] = (), repo_id: str | None = None
    ) -> "CardData":
        """Collect a card's data from a report and the file names of its figures.

        Without `repo_id` the snippets show `user/<run's name>` and the card says so. Raises `ReportError` for a report
        that is not valid, and `ValueError` for a `repo_id` that the Hub would refuse.
        """
        report = validate_report(report)
        if repo_id is not None:
            try:
                validate_repo_id(repo_id)
            except HFValidationError as error:
                raise ValueError(f"repo_id {repo_id!r} is not a Hub repository's name: {error}") from error
        return cls(report, _captioned(figures), repo_id, _baseline(report))


def render_card(data: CardData) -> str:
    """Return the card, YAML metadata and Markdown, with its signature; equal data give equal text."""
    report, run = data.report, data.report.run
    headline, evaluations, facts = headline_rows(report), evaluation_rows(report), fact_rows(report)
    name, paper = one_line(run.name) or "unnamed run", run.method_paper
    metadata = ModelCardData(**card_metadata(run, report.data))
    results = [*headline_results(headline, report.data), *evaluation_results(evaluations)]
    if run.model.loaded_by != "AutoModelForCausalLM":
        for result in results:
            result.task_type, result.task_name = "other", "Other"
    if results:
        metadata.model_name, metadata.eval_results = name, results
    first, others = first_figures(data.figures)
    baseline_name = None if data.baseline is None else data.baseline.name
    papers = {"hf_lowrank_study": STUDY} | ({slug(run.method): paper} if paper else {})
    label = escape(run.method_label or run.method)
    embedded = report.data is not None and report.data.source == "embedded"
    return signed(
        _environment()
        .get_template("card.md.jinja")
        .render(
            card=data,
            name=name,
            metadata=Markdown(metadata.to_yaml()),
            label=label,
            method=Markdown(f"[{label}]({paper.address})") if paper and paper.address else label,
            # a method that does not tell has the form that most have
            dense=run.dense_form is not False,
            published=run.weights_published is not False,
            loader=Markdown(run.model.loaded_by) if (run.model.loaded_by or "").isidentifier() else None,
            is_causal=run.model.loaded_by == "AutoModelForCausalLM",
            headline=headline,
            glance=at_a_glance(headline, data.baseline.rows if data.baseline else (), baseline_name),
            first=first,
            others=others,
            evaluations=evaluations,
            facts=facts,
            fact={fact.key: fact.text for fact in facts},
            known={fact.key for fact in facts if fact.text != UNKNOWN},
            limits=_limits(report, headline),
            chosen=_chosen(run, facts),
            repo=Markdown(json.dumps(data.repo_id or f"user/{slug(run.name)}")),
            has_tokenizer=report.data is not None and report.data.tokenizer_hash is not None,
            prompt=Markdown(json.dumps("def " if embedded else "Once upon a time")),
            study=Markdown(f"[{STUDY.title}]({STUDY.address})"),
            command=None if run.command is None else fenced(shlex.join(run.command), "bash"),
            bibtex=fenced("\n\n".join(_bibtex(paper, key) for key, paper in papers.items()), "bibtex"),
        )
    )


def write_card(publish: Path | str, repo_id: str | None = None, *, overwrite: bool = False) -> Path:
    """Render the card of the run in `publish` from its report.json and figures/ into README.md; return its path.

    Results on registered benchmarks go beside it into `.eval_results/`, where the Hub's leaderboards find them.

    Raises:
        OverwriteError: somebody has edited README.md, or written it; `overwrite=True` replaces it.
        ValueError: the Hub would refuse `repo_id`.
        What `read_report` raises.
    """
    publish = Path(publish)
    path = publish / "README.md"
    report = read_report(publish / "report.json")
    figures = sorted(figure.name for figure in (publish / "figures").glob("*.png"))
    text = render_card(CardData.from_report(report, figures, repo_id))
    if not overwrite:
        _refuse_edited(path)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    write_benchmarks(publish, report)
    return path


def update_card(publish: Path | str, repo_id: str | None = None) -> Path:
    """Write a card where numbers are new; one that somebody has edited stays as it is, with a warning."""
    try:
        return write_card(publish, repo_id)
    except OverwriteError as edited:
        logger.warning("it stays as it is, without the newest numbers: %s", edited)
        write_benchmarks(Path(publish), read_report(Path(publish) / "report.json"))
        return Path(publish) / "README.md"


def set_card_aside(publish: Path) -> None:
    """Move a card that somebody has edited out of a folder that another run is going to fill."""
    path = publish / "README.md"
    if not is_edited(path):
        return
    names = (f"README.edited{number or ''}.md" for number in itertools.count())
    aside = next(publish.parent / name for name in names if not (publish.parent / name).exists())
    path.replace(aside)
    logger.warning("%s, which was edited, is of an earlier run: it is %s now", path, aside)


def _refuse_edited(path: Path) -> None:
    if is_edited(path):
        raise OverwriteError(
            f"{path} was edited since hf_lowrank wrote it, or somebody else wrote it: keep it, or write it anew with "
            f"`hf-lowrank card {shlex.quote(str(path.parent))} --yes` (in Python: overwrite=True)"
        )


def store_card(publish: Path, output: Path, repo_id: str | None = None, *, overwrite: bool = False) -> Path:
    """Store report, figures and card of the run in `publish` under `output/<run's name>`; return the card.

    It is an example: without weights, its figures reduced to a palette of 32 colours, a quarter of their size. What
    lay in the folder before is replaced.

    Raises:
        ValueError: the report names this machine or a folder on it, which an example must not.
        What `read_report` and `write_card` raise.
    """
    from PIL import Image

    report = read_report(publish)
    if private := _place_named(report, publish):
        raise ValueError(
            f"{publish / 'report.json'} holds {private}, which says where it was made: measure and evaluate the run "
            "by a relative path, from the folder that holds it"
        )
    folder = output / slug(report.run.name)
    if not overwrite:
        _refuse_edited(folder / "README.md")
    if folder.resolve() != publish.resolve():
        shutil.rmtree(folder / "figures", ignore_errors=True)
        write_report(report, folder / "report.json")
        for figure in sorted((publish / "figures").glob("*.png")):
            with Image.open(figure) as image, atomic_path(folder / "figures" / figure.name) as path:
                # the figures' flat colours survive so few; a photograph's would not
                image.convert("RGB").quantize(32, dither=Image.Dither.NONE).save(path, format="PNG", optimize=True)
    return write_card(folder, repo_id=repo_id, overwrite=True)


def _place_named(report: Report, publish: Path) -> str | None:
    """Return this machine's name or a folder on it, where a text of the report holds one."""
    text = report.model_dump_json()
    for private in map(str, (publish.resolve().parent, Path.cwd(), Path.home(), platform.node())):
        if private not in ("", os.sep, "localhost") and re.search(rf"(?<![\w.-]){re.escape(private)}(?![\w-])", text):
            return private
    return None


def _bibtex(paper: Paper, key: str) -> str:
    # the first two digits of a number on arXiv are the year
    year = f"20{one_line(paper.arxiv)[:2]}" if paper.arxiv else paper.year
    fields = {
        "title": one_line(paper.title),
        "author": one_line(paper.authors).replace(", ", " and "),
        "year": year,
        **({"eprint": one_line(paper.arxiv), "archivePrefix": "arXiv"} if paper.arxiv else {}),
        "url": one_line(paper.address),
    }
    lines = ",\n".join(f"  {name:13} = {{{value}}}" for name, value in fields.items() if value)
    return f"@misc{{{key},\n{lines}\n}}"


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
        "measured_with": measured_with,
        "or_blank": lambda value: "" if value is None else value,
        "url": lambda name: Markdown(quote(name, safe="")),
        "value": lambda entry: format_value(entry.value, entry.stderr),
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
    rows = beside_baseline(report)
    return Baseline(
        name=baseline.name,
        method=baseline.method_label or baseline.method,
        facts=facts,
        rows=rows,
        reading=_reading(rows),
        conflicts=texts["conflict"],
        notes=texts["note"],
    )


def _reading(rows: Sequence[Pair]) -> str:
    """Return how the differences of run and baseline are to be read."""
    tests = sum(row.delta.counts for row in rows)
    sentences = ["A difference is this run's number minus the baseline's, ± one standard error."]
    if any(row.delta.test == "unpaired" for row in rows):
        sentences.append(
            f"{UNPAIRED} marks an unpaired one: its error is as if the two were independent, which is too large on a "
            "text that both share."
        )
    if tests:
        sentences.append(
            f"q is p corrected for {tests} test{'s' if tests > 1 else ''} (Benjamini-Hochberg; * q < 0.05, "
            "** q < 0.01, *** q < 0.001); with one seed each it says whether these two models differ, not whether "
            "the two methods do."
        )
    return " ".join(sentences)


def _in_words(difference: Difference) -> str:
    """Return a difference between run and baseline, `tokens seen (99 here, 10 there)`."""
    here, there = difference.words
    if UNKNOWN in (here, there):
        values = f"{UNKNOWN} for {'this run' if here == UNKNOWN else 'the baseline'}"
    else:
        values = f"{here} here, {there} there"
    return f"{difference.fact.title.lower()} ({values})"


def _chosen(run: Run, facts: Sequence[Fact]) -> str | None:
    """Return which of its steps a run published and why, if it chose; an underscore inside a word is no markup."""
    text = next((fact.text for fact in facts if fact.key == "best_of"), None)
    is_word = run.best_of is not None and re.fullmatch(r"[^\W_]+(_+[^\W_]+)*", run.best_of.metric)
    return Markdown(text) if text is not None and is_word else text


def _captioned(figures: Sequence[str]) -> list[tuple[str, str]]:
    """Return (file name, caption), the figures that this package draws first."""
    captions = {picture.file: picture.caption for entry in entries() for picture in entry.pictures}
    others = sorted(set(figures) - captions.keys())
    return [(name, captions.get(name, Path(name).stem)) for name in [*captions, *others] if name in figures]


def _limits(report: Report, headline: Sequence[HeadlineRow]) -> list[str]:
    """Return what the report's facts say about how far the model and its numbers carry, one sentence or two each."""
    run, data = report.run, report.data
    limits = []
    if data is None:
        limits.append("What the model was trained on is not recorded: nothing is known about what it may have learnt.")
    else:
        limits.append(
            f"It is a base model, trained to continue text from {one_line(data.name)} and nothing else. The run "
            "holds no instruction tuning, alignment or safety step: do not show what it writes to people unchecked."
        )
    parameters, tokens = run.model.parameters, run.tokens_seen
    if parameters and tokens is not None:
        limits.append(
            f"It has {format_count(parameters)} parameters and saw {format_count(tokens)} tokens, "
            f"{tokens / parameters:.2g} tokens a parameter."
        )
    done = run.steps_done
    if run.stopped_early:
        limits.append(f"Training stopped at step {done:,} of {run.max_steps:,}.")
    if run.best_of is not None:
        limits.append(
            f"Weights and numbers are of step {run.steps:,}, the best of {done:,} steps by {run.best_of.metric}: on "
            "the data that decided this they are a little better than on others. Wall time and peak memory are the "
            "whole run's."
        )
    elif run.checkpoint_of is not None:
        end = run.checkpoint_of.steps
        later = "training was under way" if end is None else f"training went on to step {end:,}"
        limits.append(f"This is the checkpoint of step {run.steps:,}: {later}.")
    limits.append(
        "All numbers come from one run with one seed: they say nothing about the spread between seeds, and standard "
        "errors cover the measurement only."
    )
    if not report.evaluations:
        limits.append("It was not evaluated on downstream tasks.")
    elif any(entry.limit is not None for entry in evaluation_rows(report)):
        limits.append("Downstream results with a limit are of the first items of a task alone.")
    for row in headline:
        if row.entry.value is None:
            note = row.entry.about.get("note")
            limits.append(f"{row.metric.label} could not be measured{f' ({note})' if note else ''}.")
    return limits
