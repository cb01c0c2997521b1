"""`hf-lowrank`: publish, fetch and look at runs from the command line."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from hf_lowrank.report.catalogue import CATALOGUE

__all__ = ["app", "fail", "main"]

app = typer.Typer(
    name="hf-lowrank",
    help="Publish, fetch and look at low-rank pre-training runs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


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
    from hf_lowrank.report import read_report
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
def measure(
    runs: Annotated[list[str], typer.Argument(help="Run folders, or Hub repos (user/name, user/name@step-1000).")],
    baseline: Annotated[
        str | None, typer.Option(help="Full-rank run that activations and barriers between methods refer to.")
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(help=f"With commas: {','.join(entry.name for entry in CATALOGUE)}."),
    ] = None,
    preset: Annotated[str, typer.Option(help="quick, or study: the settings of arXiv 2605.13652.")] = "quick",
    sequences: Annotated[int | None, typer.Option(help="Validation sequences; default: the preset's.")] = None,
    steps: Annotated[str | None, typer.Option(help="Checkpoints to measure, with commas; default: all.")] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences in one forward pass.")] = 16,
    device: Annotated[str | None, typer.Option(help="cuda, cpu, ...; default: a GPU where there is one.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for one run's results instead of its own.")] = None,
    dataset_name: Annotated[str | None, typer.Option(help="Validation data: Hub data set.")] = None,
    dataset_config_name: Annotated[str | None, typer.Option(help="Its configuration.")] = None,
    dataset_path: Annotated[Path | None, typer.Option(help="Validation data: file or folder.")] = None,
    dataset_glob: Annotated[str | None, typer.Option(help="Files to take from the folder.")] = None,
    tokenizer_name: Annotated[str | None, typer.Option(help="Tokenizer; default: the run's.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens in a row of the validation data.")] = None,
) -> None:
    """Measure every metric over the checkpoints of runs, into their reports, tables, figures and cards.

    A measurement that was interrupted goes on where it stopped when the same command is given again.
    """
    from hf_lowrank.measure.command import run_measure

    failures = run_measure(
        runs, baseline, only=only, preset=preset, sequences=sequences, steps=steps, batch_size=batch_size,
        device=device, output=output,
        data={
            "dataset_name": dataset_name,
            "dataset_config_name": dataset_config_name,
            "dataset_path": None if dataset_path is None else str(dataset_path),
            "dataset_glob": dataset_glob,
            "tokenizer_name": tokenizer_name,
            "sequence_length": sequence_length,
        },
    )  # fmt: skip
    if failures:
        raise typer.Exit(1)


@app.command()
def evaluate(
    runs: Annotated[list[str], typer.Argument(help="Run folders, or Hub repos (user/name, user/name@step-1000).")],
    tasks: Annotated[str, typer.Option(help="With commas: lm-eval tasks, groups, tags, wildcards; study, quick.")],
    checkpoints: Annotated[str, typer.Option(help="last, all, or steps with commas.")] = "last",
    num_fewshot: Annotated[int | None, typer.Option(help="Examples in the prompt; default: each task's own.")] = None,
    seeds: Annotated[str | None, typer.Option(help="With commas; default: the harness's own.")] = None,
    bootstrap_iters: Annotated[
        int | None, typer.Option(help="For standard errors that have no formula; default: 100000, in study 1000.")
    ] = None,
    limit: Annotated[float | None, typer.Option(help="First so many items of each task, or a share below 1.")] = None,
    include_path: Annotated[
        list[Path] | None, typer.Option("--include-path", "--include_path", help="Folder of own tasks; repeatable.")
    ] = None,
    form: Annotated[str, typer.Option(help="native, as trained, or dense.")] = "native",
    dtype: Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16 or float16.")] = "auto",
    batch_size: Annotated[str, typer.Option(help="Requests in one forward pass, or auto.")] = "16",
    max_length: Annotated[int | None, typer.Option(help="Tokens of context; default: the model's.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda, cpu, ...; default: a GPU where there is one.")] = None,
    tokenizer_name: Annotated[str | None, typer.Option(help="Tokenizer; default: the run's.")] = None,
    use_cache: Annotated[
        Path | None, typer.Option(help="Folder for answers: a task interrupted in its midst goes on there.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for one run's results instead of its own.")] = None,
) -> None:
    """Evaluate runs on downstream tasks with lm-evaluation-harness, into their reports and cards.

    An evaluation that was interrupted goes on with the next task when the same command is given again.
    """
    from hf_lowrank.downstream.command import run_evaluate

    failures = run_evaluate(
        runs, tasks, checkpoints=checkpoints, num_fewshot=num_fewshot, seeds=seeds, bootstrap_iters=bootstrap_iters,
        limit=limit, include_path=include_path or [], form=form, dtype=dtype, batch_size=batch_size,
        max_length=max_length, device=device, tokenizer_name=tokenizer_name, use_cache=use_cache, output=output,
    )  # fmt: skip
    if failures:
        raise typer.Exit(1)


@app.command(
    "lm-eval",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def lm_eval(context: typer.Context) -> None:
    """lm-evaluation-harness' own command line with our tasks and --model hf-lowrank."""
    from hf_lowrank.downstream.lm_eval_cli import run_lm_eval

    raise typer.Exit(run_lm_eval(context.args))


@app.command()
def compare(
    runs: Annotated[
        list[str] | None, typer.Argument(help="Run folders, published folders, Hub repos (user/name, repo@revision).")
    ] = None,
    tag: Annotated[str | None, typer.Option(help="Also the runs that the Hub lists under it: hf-lowrank.")] = None,
    limit: Annotated[int, typer.Option(help="With --tag: how many of the newest.")] = 20,
    baseline: Annotated[str | None, typer.Option(help="Run to take differences to: name or source.")] = None,
    sort: Annotated[
        str | None, typer.Option(help="Metric to sort by: validation_loss, H9, task/acc, ...; default: as given.")
    ] = None,
    descending: Annotated[bool, typer.Option("--descending", help="The largest first.")] = False,
    group_seeds: Annotated[
        bool,
        typer.Option("--group-seeds", help="Runs that differ only in their seed as one, mean and error."),
    ] = False,
    output: Annotated[Path, typer.Option(help="Folder for page, tables and figures.")] = Path("comparison"),
    push_to_space: Annotated[str | None, typer.Option(help="Publish the page as this Space, user/name.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Overwrite a Space that is not ours.")] = False,
) -> None:
    """Compare runs: terminal, CSV, Markdown, figures, one HTML page; says where they are not comparable.

    Exit code 1: a run that was named could not be read and was skipped.
    """
    from hf_lowrank.compare.command import run_compare

    skipped = run_compare(
        runs or [], tag=tag, limit=limit, baseline=baseline, sort=sort, descending=descending,
        group_seeds=group_seeds, output=output, push_to_space=push_to_space, yes=yes,
    )  # fmt: skip
    if skipped:
        raise typer.Exit(1)


@app.command()
def card(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, publish/ folders, or folders with a report.json.")],
    repo_id: Annotated[str | None, typer.Option(help="Repo the card speaks of.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder that gets report, figures and card of each run, without its weights.")
    ] = None,
) -> None:
    """Write the model cards of stored reports again."""
    from hf_lowrank.hub.card import write_card
    from hf_lowrank.hub.examples import store_card

    if repo_id is not None and len(runs) > 1:
        raise ValueError(f"--repo-id {repo_id} is for one run, {len(runs)} are given: drop one of them")
    # a shell's * finds the README.md beside the runs as well
    for run in [run for run in runs if len(runs) == 1 or not run.is_file()]:
        folder = run / "publish" if (run / "publish").is_dir() else run
        typer.echo(
            write_card(folder, repo_id=repo_id) if output is None else store_card(folder, output, repo_id=repo_id)
        )


@app.command()
def config(method: Annotated[str, typer.Argument(help="Method, galore for example.")]) -> None:
    """Print a method's settings with their defaults, as JSON."""
    from hf_lowrank.methods import get_method

    typer.echo(json.dumps(get_method(method)().to_dict(), indent=2))


def main() -> None:
    """Entry point: an error of the user's is one line on standard error and exit code 2."""
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
