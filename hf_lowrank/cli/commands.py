"""`hf-lowrank`: publish, fetch and look at runs from the command line."""

import io
import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from hf_lowrank import __version__
from hf_lowrank.cli.flags import with_flags
from hf_lowrank.options import CompareOptions, EvaluateOptions, MeasureOptions, StudyOptions

__all__ = ["app", "fail", "main"]

app = typer.Typer(
    name="hf-lowrank",
    help="Publish, fetch and look at low-rank pre-training runs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

RUNS = "Run folders, or Hub repos (user/name, user/name@step-1000)."


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"hf-lowrank {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def push(
    run: Annotated[Path, typer.Argument(help="Run folder, or its publish/ folder.")],
    repo_id: Annotated[str, typer.Option(help="Repo to push to, user/name.")],
    revision: Annotated[str | None, typer.Option(help="Branch to push to.")] = None,
    private: Annotated[bool | None, typer.Option(help="Make the repo private when it is created.")] = None,
    tag: Annotated[str | None, typer.Option(help="Tag to put on the commit; default: the report's step.")] = None,
    checkpoints: Annotated[
        bool, typer.Option("--checkpoints", help="Publish kept checkpoints too, under tags step-<n> not yet there.")
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Push even over what somebody else, or another run, has put there.")
    ] = False,
) -> None:
    """Publish a run: report, card, figures and weights in one commit; nothing changed, no commit.

    The token is that of `hf auth login`, or HF_TOKEN: on a command line everybody on the machine could read it.
    """
    from hf_lowrank.hub.asking import ask_first
    from hf_lowrank.hub.push import push as push_run

    push_it = partial(push_run, run, repo_id, revision=revision, private=private, tag=tag, checkpoints=checkpoints)
    typer.echo(ask_first(push_it, yes).commit_url)


@app.command()
def load(
    repo: Annotated[str, typer.Argument(help="Repo id (also repo@revision) or local folder.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
) -> None:
    """Fetch a published run, check that its weights and report are whole, print the summary."""
    from rich.console import Console

    from hf_lowrank.checkpoints import load_model
    from hf_lowrank.hub.fetch import fetch
    from hf_lowrank.methods.prepare import method_of
    from hf_lowrank.report.io import read_report
    from hf_lowrank.report.terminal import evaluations_table, facts_table, headline_table

    folder = fetch(repo, revision=revision)
    report = read_report(folder)
    model = load_model(folder)
    method = method_of(model)
    forms = "as trained and dense" if method is None or method.has_dense_form else "as trained"
    if forms != "as trained":
        load_model(folder, dense=True)
    console = Console()
    console.print(facts_table(report))
    console.print(headline_table(report))
    if report["evaluations"]:
        console.print(evaluations_table(report))
    typer.echo(f"{type(model).__name__} in {folder}: {forms}, every weight accounted for")


@app.command()
@with_flags
def measure(
    runs: Annotated[list[str], typer.Argument(help=RUNS)],
    options: MeasureOptions,
    baseline: Annotated[
        str | None, typer.Option(help="Full-rank run that activations and barriers between methods refer to.")
    ] = None,
) -> None:
    """Measure every metric over the checkpoints of runs, into their reports, tables, figures and cards.

    The same command continues an interrupted measurement.
    """
    from hf_lowrank.cli.measure import run_measure

    if run_measure(runs, baseline, options):
        raise typer.Exit(1)


@app.command()
@with_flags
def evaluate(runs: Annotated[list[str], typer.Argument(help=RUNS)], options: EvaluateOptions) -> None:
    """Evaluate runs on downstream tasks with lm-evaluation-harness, into their reports and cards.

    The same command continues an interrupted evaluation with the next task.
    """
    from hf_lowrank.cli.evaluate import run_evaluate

    if run_evaluate(runs, options):
        raise typer.Exit(1)


@app.command(
    "lm-eval",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def lm_eval(context: typer.Context) -> None:
    """lm-evaluation-harness' own command line with our tasks and --model hf-lowrank."""
    from hf_lowrank.cli.lm_eval import run_lm_eval

    raise typer.Exit(run_lm_eval(context.args))


@app.command()
@with_flags
def compare(
    options: CompareOptions,
    runs: Annotated[
        list[str] | None, typer.Argument(help="Run folders, published folders, Hub repos (user/name, repo@revision).")
    ] = None,
) -> None:
    """Compare runs: terminal, CSV, Markdown, figures, one HTML page; says if they are not comparable.

    Exit code 1: a run that was named could not be read and was skipped.
    """
    from hf_lowrank.cli.compare import run_compare

    if run_compare(runs or [], options):
        raise typer.Exit(1)


@app.command()
@with_flags
def study(
    options: StudyOptions,
    sources: Annotated[
        list[str] | None, typer.Argument(help="The study's YAML file; with --analyse folders or Hub repos.")
    ] = None,
) -> None:
    """Run a study: methods x sizes x seeds, their metrics and tasks, the analysis.

    The same command continues an interrupted study. Exit code 1: a run failed, diverged or was left out.
    """
    from hf_lowrank.cli.study import run_study_command

    if code := run_study_command(sources or [], options):
        raise typer.Exit(code)


@app.command()
def card(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, publish/ folders, or folders with a report.json.")],
    repo_id: Annotated[str | None, typer.Option(help="Repo the card speaks of.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder that gets report, figures and card of each run, without its weights.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Replace cards that somebody has edited, too.")] = False,
) -> None:
    """Write the model cards of stored reports again; a card that somebody has edited is replaced only if asked to."""
    from hf_lowrank.hub.asking import ask_first
    from hf_lowrank.hub.card import store_card, write_card

    if repo_id is not None and len(runs) > 1:
        raise ValueError(f"--repo-id {repo_id} is for one run, {len(runs)} are given: drop one of them")
    # a shell's * finds the README.md beside the runs as well
    for run in [run for run in runs if len(runs) == 1 or not run.is_file()]:
        folder = run / "publish" if (run / "publish").is_dir() else run
        write = partial(write_card, folder) if output is None else partial(store_card, folder, output)
        typer.echo(ask_first(partial(write, repo_id=repo_id), yes))


@app.command()
def config(method: Annotated[str, typer.Argument(help="Method, galore for example.")]) -> None:
    """Print a method's settings with their defaults, as JSON."""
    from hf_lowrank.methods import get_method

    typer.echo(json.dumps(get_method(method)().to_dict(), indent=2))


def main() -> None:
    """Entry point: an error of the user's is one line on standard error and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # a terminal or file whose encoding lacks a sign gets a question mark
            stream.reconfigure(errors="replace")
    try:
        app()
    except Exception as error:
        if not _is_expected(error):
            raise
        # a file that could not be uploaded: huggingface_hub names it, and the cause says why
        upload = isinstance(error, RuntimeError) and error.__cause__ is not None
        fail(RuntimeError(f"{error} {error.__cause__}") if upload else error)


def _is_expected(error: Exception) -> bool:
    """Whether an error comes from what the user asked for, or from the network."""
    if isinstance(error, ValueError | OSError | RuntimeError):
        return True
    # where huggingface_hub was not imported, no error is of its HTTP library, which depends on its version
    hub_errors = sys.modules.get("huggingface_hub.errors")
    return hub_errors is not None and isinstance(error, hub_errors.HfHubHTTPError.__bases__)


def fail(error: BaseException, main_process: bool = True) -> NoReturn:
    """End the program with one line on standard error and exit code 2."""
    from hf_lowrank.report.markdown import one_line
    from hf_lowrank.report.secrets import redact

    if main_process:
        print(f"error: {redact(one_line(error))}", file=sys.stderr)
    raise SystemExit(2)
