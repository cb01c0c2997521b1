"""`hf-lowrank compare`: runs in, terminal, CSV, Markdown, figures, page and Space out."""

from functools import partial
from pathlib import Path

from huggingface_hub.utils import validate_repo_id
from rich.console import Console
from rich.text import Text

from hf_lowrank.compare.charts import charts
from hf_lowrank.compare.figures import draw_comparison
from hf_lowrank.compare.gather import Gathered, gather
from hf_lowrank.compare.matched import parse_at
from hf_lowrank.compare.page import render_page
from hf_lowrank.compare.table import Comparison, compare
from hf_lowrank.compare.terminal import print_comparison
from hf_lowrank.compare.text import heading, metrics_csv, render_markdown, runs_csv
from hf_lowrank.hub.asking import ask_first
from hf_lowrank.hub.listing import published_runs
from hf_lowrank.hub.space import push_space, space_card
from hf_lowrank.options import CompareOptions, nearest
from hf_lowrank.report.files import atomic_path

__all__ = ["run_compare"]


def run_compare(sources: list[str], options: CompareOptions) -> int:
    """Compare runs; return how many that were asked for by name were skipped.

    Raises:
        ValueError: an argument makes no sense, no run is left, or the baseline cannot be read; nothing is written.
    """
    tag, token, output, baseline = options.tag, options.token, options.output, options.baseline
    if not sources and tag is None:
        raise ValueError("no run to compare: give run folders or Hub repositories, or --tag hf-lowrank")
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file: give a folder")
    if options.push_to_space is not None:
        validate_repo_id(options.push_to_space)
    place = None if options.at is None else parse_at(options.at)
    console = Console()
    listed = [] if tag is None else published_runs(tag, options.limit, token)
    gathered = gather(sources, listed, token)
    at = None if baseline is None else _baseline(baseline, gathered, sources, token)
    if at is not None and at < 0:
        gathered = gather([str(baseline), *sources], listed, token)
        at = 0
    if not gathered.runs:
        raise ValueError(_nothing_left(gathered, tag))
    comparison = compare(
        gathered.runs,
        baseline=at,
        sort=options.sort,
        descending=options.descending,
        group_seeds=options.group_seeds,
        at=place,
    )
    _print_left_out(gathered, console)
    print_comparison(comparison, console, options.all)
    page, text = _write(comparison, output)
    console.print(Text(f"{output} holds index.html, comparison.md, metrics.csv, runs.csv and figures/"))
    if options.push_to_space is not None:
        repos = [repo for row in comparison.rows for repo in row.repos]
        files = {"README.md": space_card(heading(comparison), text, repos), "index.html": page}
        console.print(Text(ask_first(partial(push_space, files, options.push_to_space, token=token), options.yes)))
    return len(gathered.skipped)


def _baseline(name: str, gathered: Gathered, sources: list[str], token: str | None) -> int | None:
    """The baseline's place among the runs, -1 if it is a run that was not given."""
    at = gathered.index(name)
    if at is not None:
        return at
    alone = gather([name], token=token)
    if alone.runs:
        return -1
    hint = nearest(name, [run.label for run in gathered.runs])
    raise ValueError(f"--baseline {name}{hint}: none of the runs, and {alone.skipped[0].reason}")


def _print_left_out(gathered: Gathered, console: Console) -> None:
    for skipped in gathered.skipped:
        console.print(Text(f"skipped {skipped.source}: {skipped.reason}", style="red"), soft_wrap=True)
    for skipped in gathered.passed_over:
        console.print(Text(f"passed over {skipped.source}: {skipped.reason}", style="yellow"), soft_wrap=True)
    for source in gathered.twice:
        console.print(Text(f"{source} is given twice and compared once", style="yellow"), soft_wrap=True)


def _nothing_left(gathered: Gathered, tag: str | None) -> str:
    if gathered.skipped:
        first = gathered.skipped[0]
        more = f" (and {len(gathered.skipped) - 1} more)" if len(gathered.skipped) > 1 else ""
        return f"no run to compare: {first.source}: {first.reason}{more}"
    if gathered.passed_over:
        return f"no run to compare: none of the {len(gathered.passed_over)} that the Hub lists under {tag} can be read"
    return f"no run to compare: the Hub lists none under the tag {tag}"


def _write(comparison: Comparison, output: Path) -> tuple[str, str]:
    """Write everything into the folder; return the page and the Markdown without figures."""
    drawn = charts(comparison)
    figures = draw_comparison(comparison, drawn, output / "figures")
    page = render_page(comparison, drawn)
    files = {
        "index.html": page,
        "comparison.md": render_markdown(comparison, [f"figures/{path.name}" for path in figures]),
        "metrics.csv": metrics_csv(comparison),
        "runs.csv": runs_csv(comparison),
    }
    for name, text in files.items():
        with atomic_path(output / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return page, render_markdown(comparison)
