"""`hf-lowrank`: publish, fetch and look at runs from the command line."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["app", "main"]

app = typer.Typer(
    name="hf-lowrank",
    help="Publish, fetch and look at low-rank pre-training runs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Token = Annotated[
    str | None, typer.Option(help="Hub token; default: the one you are logged in with.", envvar="HF_TOKEN")
]


@app.command()
def push(
    run: Annotated[Path, typer.Argument(help="Run folder, or its publish/ folder.")],
    repo_id: Annotated[str, typer.Option(help="Repo to push to, user/name.")],
    revision: Annotated[str | None, typer.Option(help="Branch to push to.")] = None,
    private: Annotated[bool | None, typer.Option(help="Make the repo private when it is created.")] = None,
    tag: Annotated[str | None, typer.Option(help="Tag to put on the commit; default: the report's step.")] = None,
    token: Token = None,
) -> None:
    """Publish a run: report, card, figures and weights in one commit; nothing changed, no commit."""
    from hf_lowrank.hub.push import push as push_run

    commit = push_run(run, repo_id, revision=revision, private=private, token=token, tag=tag)
    typer.echo(commit.commit_url)


@app.command()
def load(
    repo: Annotated[str, typer.Argument(help="Repo id (also repo@revision) or local folder.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    token: Token = None,
) -> None:
    """Fetch a published run, check that its weights and report are whole, print the summary."""
    from rich.console import Console
    from rich.table import Table

    from hf_lowrank.checkpoints import load_model
    from hf_lowrank.hub.fetch import fetch
    from hf_lowrank.prepare import method_of
    from hf_lowrank.report import fact_rows, headline_rows, read_report

    folder = fetch(repo, revision=revision, token=token)
    report = read_report(folder)
    model = load_model(folder)
    method = method_of(model)
    forms = "as trained and dense" if method is None or method.has_dense_form else "as trained"
    if forms != "as trained":
        load_model(folder, dense=True)
    console = Console()
    facts = Table(title=report["run"]["name"], title_justify="left", show_header=False)
    for fact in fact_rows(report):
        facts.add_row(fact.label, fact.text)
    console.print(facts)
    metrics = Table(title="metrics", title_justify="left")
    for column in ("", "metric", "value", "weights", "step"):
        metrics.add_column(column)
    for row in headline_rows(report):
        metrics.add_row(row.id or "", row.name, row.text, row.space or "", str(row.step))
    console.print(metrics)
    typer.echo(f"{type(model).__name__} in {folder}: {forms}, every weight accounted for")


@app.command()
def measure(
    runs: Annotated[list[str], typer.Argument(help="Run folders, or Hub repos (user/name, user/name@step-1000).")],
    baseline: Annotated[
        str | None, typer.Option(help="Full-rank run that activations and barriers between methods refer to.")
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(help="With commas: loss,spectral,activation,interpolation,curvature,landscape."),
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
    token: Token = None,
) -> None:
    """Measure every metric over the checkpoints of runs, into their reports, tables, figures and cards.

    A measurement that was interrupted goes on where it stopped when the same command is given again.
    """
    from hf_lowrank.measure.command import run_measure

    failures = run_measure(
        runs, baseline, only=only, preset=preset, sequences=sequences, steps=steps, batch_size=batch_size,
        device=device, output=output, token=token,
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
def card(
    run: Annotated[Path, typer.Argument(help="Run folder, publish/ folder, or folder with a report.json.")],
    repo_id: Annotated[str | None, typer.Option(help="Repo the card speaks of.")] = None,
) -> None:
    """Write the model card of a stored report again."""
    from hf_lowrank.hub.card import write_card

    folder = run / "publish" if (run / "publish").is_dir() else run
    typer.echo(write_card(folder, repo_id=repo_id))


@app.command()
def config(method: Annotated[str, typer.Argument(help="Method, galore for example.")]) -> None:
    """Print a method's settings with their defaults, as JSON."""
    from hf_lowrank.methods import get_method

    typer.echo(json.dumps(get_method(method)().to_dict(), indent=2))


def main() -> None:
    """Entry point: an error of the user's is one line on standard error and exit code 2."""
    from huggingface_hub.errors import HfHubHTTPError

    from hf_lowrank.arguments import fail

    # its bases: OSError and the class of the HTTP library, which depends on the version of huggingface_hub
    failures: tuple[Any, ...] = (ValueError, OSError, *HfHubHTTPError.__bases__)
    try:
        app()
    except failures as error:
        fail(error)
    # a file that could not be uploaded: huggingface_hub names it, and the cause says why
    except RuntimeError as error:
        fail(error if error.__cause__ is None else RuntimeError(f"{error} {error.__cause__}"))
