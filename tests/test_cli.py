"""`hf-lowrank` from its command line: what it does, and one line and exit code 2 where it cannot."""

import io
import json
import re
import shutil
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tiny_runs import METHODS, arguments, make_trainer
from typer.testing import CliRunner

import hf_lowrank as lr
import hf_lowrank.run.report
from hf_lowrank.cli import app, main
from hf_lowrank.cli.flags import with_flags
from hf_lowrank.hub import network
from hf_lowrank.methods import METHODS as REGISTERED
from hf_lowrank.options import CompareOptions, EvaluateOptions, MeasureOptions, flag_name
from hf_lowrank.report.io import read_report, write_report


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished run; its figures are left out, since drawing takes seconds."""
    folder = tmp_path_factory.mktemp("runs") / "my-run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_lowrank.run.report, "draw_figures", lambda publish: [])
        trainer = make_trainer(METHODS["sltrain"], arguments(folder, max_steps=2, save_strategy="steps", save_steps=2))
        lr.attach(trainer, lr.SpectralCallback(every=2))
        trainer.train()
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run that a test may change."""
    shutil.copytree(trained, tmp_path / "my-run")
    return tmp_path / "my-run"


@pytest.fixture
def cli(monkeypatch, capsys):
    """Calls `hf-lowrank` with arguments: exit code, standard output and error."""

    def call(*argv):
        capsys.readouterr()
        # rich folds tables to the terminal, and a test has none
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "argv", ["hf-lowrank", *map(str, argv)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code or 0, out=out, err=err)

    return call


@pytest.fixture
def refusal(cli):
    """Calls `hf-lowrank` with what it must refuse, and returns the one line it says."""

    def call(*argv):
        done = cli(*argv)
        assert done.code == 2, done.err
        assert done.out == ""
        assert done.err.startswith("error: ")
        assert done.err.count("\n") == 1
        return done.err

    return call


def published(folder):
    publish = folder / "publish"
    return {path.relative_to(publish).as_posix(): path.read_bytes() for path in publish.rglob("*") if path.is_file()}


def held_by(repo, revision="main"):
    return {path: content for path, content in repo.files(revision).items() if path != ".gitattributes"}


# ---- push ----


def test_push_publishes_a_run_and_prints_where(cli, hub, run):
    done = cli("push", run, "--repo-id", "user/my-run")
    repo = hub.repo("user/my-run")
    assert (done.code, done.out) == (0, f"{hub.endpoint}/user/my-run/commit/{repo.head.oid}\n")
    assert held_by(repo) == published(run)
    assert '"user/my-run"' in held_by(repo)["README.md"].decode()
    assert {name: commit.oid for name, commit in repo.tags.items()} == {"step-2": repo.head.oid}
    assert not repo.private


def test_pushing_again_makes_no_commit(cli, hub, run):
    first = cli("push", run, "--repo-id", "user/my-run")
    again = cli("push", run / "publish", "--repo-id", "user/my-run")
    assert (again.code, again.out) == (0, first.out)
    assert hub.count("POST .*/commit/") == 1


def test_push_takes_branch_tag_and_visibility(cli, hub, run):
    options = ["--revision", "trial", "--tag", "v1", "--private"]
    assert cli("push", run, "--repo-id", "org/my-run", *options).code == 0
    repo = hub.repo("org/my-run")
    assert held_by(repo, "trial") == published(run)
    assert held_by(repo) == {}
    assert repo.private
    assert set(repo.tags) == {"v1"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["missing", "--repo-id", "user/x"], "no run at missing"),
        ([".", "--repo-id", "user/x"], "has no publish/ folder"),
        (["RUN", "--repo-id", "user/x/y"], "user/x/y"),
        (["RUN", "--repo-id", "user/bad name"], "user/bad name"),
        (["RUN", "--repo-id", "user/x", "--tag", "a b"], "tag 'a b'"),
        (["RUN", "--repo-id", "user/x", "--revision", "a..b"], "revision 'a..b'"),
    ],
)
def test_a_push_that_cannot_be_meant_sends_nothing(argv, message, refusal, hub, run, monkeypatch):
    monkeypatch.chdir(run.parent)
    before = published(run)
    assert message in refusal("push", *(run if word == "RUN" else word for word in argv))
    assert hub.requests == []
    assert published(run) == before


def test_a_damaged_report_is_not_pushed(refusal, hub, run):
    report = run / "publish" / "report.json"
    report.write_text(report.read_text()[:100])
    assert str(report) in refusal("push", run, "--repo-id", "user/x")
    assert hub.repos == {}


@pytest.mark.parametrize(
    ("match", "status"),
    [("POST /api/repos/create", 503), ("POST .*/commit/", 500), ("PUT /lfs/", 403), ("POST .*/tag/", 403)],
)
def test_a_hub_that_fails_is_one_line(match, status, refusal, cli, hub, run, monkeypatch):
    monkeypatch.setattr(network, "FIRST_WAIT", 0.0)
    hub.fail(match, status=status, times=100)
    assert str(status) in refusal("push", run, "--repo-id", "user/x")
    hub.faults.clear()
    assert cli("push", run, "--repo-id", "user/x").code == 0
    assert held_by(hub.repo("user/x")) == published(run)


def test_a_hub_out_of_reach_is_one_line(refusal, hub, run, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "refused" in refusal("push", run, "--repo-id", "user/x")


def test_a_wrong_token_is_one_line_that_does_not_show_it(refusal, hub, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    line = refusal("push", run, "--repo-id", "user/x")
    assert "401" in line
    assert "hf_wrong" not in line


@pytest.mark.parametrize("command", ["push", "load", "measure"])
def test_no_command_takes_a_token_which_others_could_read(command, cli, run):
    """`ps` shows everybody on the machine what was typed."""
    secret = "hf_" + "a1B2" * 9
    for words in (["--token", secret], [f"--token={secret}"]):
        done = cli(command, run, *words)
        assert (done.code, done.out) == (2, "")
        assert secret not in done.err


def test_somebody_elses_repo_needs_yes(refusal, cli, hub, run):
    hub.plant("user/x", {"model.bin": b"\0theirs"})
    assert "--yes" in refusal("push", run, "--repo-id", "user/x")
    assert held_by(hub.repo("user/x")) == {"model.bin": b"\0theirs"}
    assert cli("push", run, "--repo-id", "user/x", "--yes").code == 0
    assert held_by(hub.repo("user/x")) == published(run) | {"model.bin": b"\0theirs"}


@pytest.fixture
def answering(monkeypatch):
    """A terminal on which somebody gives an answer."""

    def answer(text):
        terminal = io.StringIO(f"{text}\n")
        terminal.isatty = lambda: True
        monkeypatch.setattr(sys, "stdin", terminal)

    return answer


@pytest.mark.parametrize(("answer", "code"), [("n", 1), ("y", 0)])
def test_on_a_terminal_it_asks(answer, code, cli, hub, run, answering):
    hub.plant("user/x", {"model.bin": b"\0theirs"})
    answering(answer)
    done = cli("push", run, "--repo-id", "user/x")
    assert done.code == code
    assert "model.bin" in done.err
    assert ("README.md" in hub.repo("user/x").files()) == (answer == "y")


def test_another_users_repo_is_one_line(refusal, hub, run):
    assert "403" in refusal("push", run, "--repo-id", "somebody/x")


def test_a_branch_leaves_the_tag_of_another_alone(cli, hub, run):
    cli("push", run, "--repo-id", "user/my-run")
    repo = hub.repo("user/my-run")
    main = repo.head.oid
    (run / "publish" / "note.txt").write_text("trial")
    for _ in range(2):
        assert cli("push", run, "--repo-id", "user/my-run", "--revision", "trial").code == 0
    tags = {name: commit.oid for name, commit in repo.tags.items()}
    assert tags == {"step-2": main, "trial-step-2": repo.branches["trial"].oid}
    assert cli("push", run, "--repo-id", "user/my-run", "--revision", "trial", "--tag", "step-2").code == 0
    assert repo.tags["step-2"].oid == repo.branches["trial"].oid


def test_push_makes_up_for_the_tags_of_kept_checkpoints(cli, hub, run, monkeypatch, caplog):
    monkeypatch.setattr("hf_lowrank.hub.push.draw_figures", lambda folder: [])
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-1")
    state = json.loads((run / "checkpoint-1" / "trainer_state.json").read_text())
    (run / "checkpoint-1" / "trainer_state.json").write_text(
        json.dumps(state | {"global_step": 1, "num_input_tokens_seen": 64})
    )
    (run / "checkpoint-3").mkdir()
    before = published(run)
    assert cli("push", run, "--repo-id", "user/my-run", "--checkpoints").code == 0
    repo = hub.repo("user/my-run")
    assert (set(repo.tags), set(repo.branches)) == ({"step-1", "step-2"}, {"main"})
    assert repo.tags["step-2"].oid == repo.head.oid
    assert "step-3 is not published" in caplog.text
    assert held_by(repo) == published(run) == before | {"README.md": published(run)["README.md"]}
    assert not list(run.glob(".pushing*"))

    report = lr.load_report("user/my-run@step-1")
    assert (report["run"]["steps"], report["run"]["tokens_seen"]) == (1, 64)
    assert report.run.checkpoint_of == {"steps": 2}
    card = repo.files("step-1")["README.md"].decode()
    assert "This is the checkpoint of step 1: training went on to step 2." in card
    assert "stopped" not in card
    assert all(entry["step"] <= 1 for entry in report["metrics"])
    model, expected = lr.from_pretrained("user/my-run", revision="step-1"), lr.from_pretrained(run / "checkpoint-2")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    assert cli("load", "user/my-run@step-1").code == 0

    commits = hub.count("POST .*/commit/")
    assert cli("push", run, "--repo-id", "user/my-run", "--checkpoints").code == 0
    assert hub.count("POST .*/commit/") == commits

    # another run of the same steps: its tags are not taken for this one's
    report = read_report(run)
    report["run"]["seeds"]["seed"] = 77
    write_report(report, run / "publish" / "report.json")
    first = repo.tags["step-1"].oid
    assert cli("push", run, "--repo-id", "user/my-run", "--revision", "other", "--checkpoints").code == 0
    assert set(repo.tags) == {"step-1", "step-2", "other-step-1", "other-step-2"}
    assert (repo.tags["step-1"].oid, set(repo.branches)) == (first, {"main", "other"})
    assert lr.load_report("user/my-run@other-step-1")["run"]["seeds"]["seed"] == 77
    assert cli("push", run, "--repo-id", "user/my-run", "--yes", "--checkpoints").code == 0
    assert repo.tags["step-1"].oid != first
    assert lr.load_report("user/my-run@step-1")["run"]["seeds"]["seed"] == 77


# ---- load ----


@pytest.mark.parametrize("source", ["user/my-run", "user/my-run@step-2", "RUN"])
def test_load_prints_the_summary_of_a_run(source, cli, hub, run):
    cli("push", run, "--repo-id", "user/my-run")
    done = cli("load", run if source == "RUN" else source)
    assert (done.code, done.err) == (0, "")
    for part in ("my-run", "sltrain", "spectral/weight/stable_rank", "LlamaForCausalLM", "every weight accounted for"):
        assert part in done.out
    report = read_report(run / "publish")
    value = next(entry["value"] for entry in report["metrics"] if entry["name"] == "perplexity")
    assert re.search(rf"perplexity\W+{int(value)}\.\d+ ± ", done.out)


def test_load_of_a_run_that_has_no_dense_form(cli, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_lowrank.run.report, "draw_figures", lambda publish: [])
    trainer = make_trainer(METHODS["cola"], arguments(tmp_path / "my-cola", max_steps=1))
    lr.attach(trainer)
    trainer.train()
    assert cli("push", tmp_path / "my-cola", "--repo-id", "user/my-cola").code == 0
    assert "modeling_cola.py" in hub.repo("user/my-cola").files()
    done = cli("load", "user/my-cola")
    assert (done.code, done.err) == (0, "")
    assert "as trained, every weight accounted for" in done.out
    assert "trust_remote_code=True" in (tmp_path / "my-cola" / "publish" / "README.md").read_text()


def test_load_takes_a_revision(cli, hub, run):
    cli("push", run, "--repo-id", "user/my-run", "--tag", "v1")
    done = cli("load", "user/my-run", "--revision", "v1")
    assert done.code == 0
    assert hub.repo("user/my-run").tags["v1"].oid in done.out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["./missing"], "no folder at missing"),
        (["user/missing"], "user/missing at revision 'main': no such repository"),
        (["not a name"], "'not a name' is neither a local folder nor a Hub repository"),
        (["user/my-run", "--revision", "v9"], "user/my-run at revision 'v9' does not exist: it has main, step-2"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(argv, message, refusal, cli, hub, run, monkeypatch):
    monkeypatch.chdir(run.parent)
    cli("push", run, "--repo-id", "user/my-run")
    assert message in refusal("load", *argv)


def test_load_finds_weights_that_are_cut_short(refusal, run):
    for path in (run / "publish" / "native" / "model.safetensors", run / "publish" / "model.safetensors"):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        assert f"{path.parent} is cut short: model.safetensors" in refusal("load", run)
        path.write_bytes(content)


def test_load_finds_a_changed_sparse_support(refusal, run):
    path = run / "publish" / "native" / "model.safetensors"
    state = load_file(path)
    name = next(key for key in state if key.endswith("sparse_support"))
    state[name] = torch.arange(len(state[name]), dtype=state[name].dtype)
    save_file(state, path, metadata={"format": "pt"})
    assert "the sparse support does not match" in refusal("load", run)


# ---- card ----


@pytest.mark.parametrize("inside", ["", "publish"])
def test_card_writes_the_card_again(inside, cli, run):
    path = run / "publish" / "README.md"
    expected = path.read_text()
    path.unlink()
    done = cli("card", run / inside)
    assert (done.code, done.out.replace("\n", "")) == (0, str(path))
    assert path.read_text() == expected
    assert cli("card", run, "--repo-id", "org/other").code == 0
    assert '"org/other"' in path.read_text()


def edited(card):
    """A sentence of somebody's in a card."""
    text = card.read_text()
    card.write_text(text.replace("<summary>Limits</summary>\n", "<summary>Limits</summary>\n\nMine.\n"))
    assert card.read_text() != text
    return text


@pytest.mark.parametrize("stored", [False, True])
def test_an_edited_card_is_replaced_only_if_asked_to(stored, cli, refusal, answering, run, tmp_path):
    into = ["--output", tmp_path / "cards"] if stored else []
    path = Path(cli("card", run, *into).out.replace("\n", ""))
    before = edited(path)
    assert re.search(r"README\.md was edited .*hf-lowrank card .* --yes", refusal("card", run, *into))
    path.write_text("# Mine.\n")
    assert "somebody else wrote it" in refusal("card", run, *into)
    answering("n")
    assert cli("card", run, *into).code == 1
    assert "Mine." in path.read_text()
    answering("y")
    assert cli("card", run, *into).code == 0
    assert path.read_text() == before
    edited(path)
    assert cli("card", run, *into, "--yes").code == 0
    assert path.read_text() == before


def test_an_edited_card_stays_where_numbers_are_new_and_is_pushed(cli, hub, run, caplog):
    path = run / "publish" / "README.md"
    edited(path)
    measured = cli("measure", run, "--only", "spectral", "--device", "cpu")
    assert measured.code == 0
    assert cli("push", run, "--repo-id", "user/x").code == 0
    assert caplog.text.count("it stays as it is, without the newest numbers") == 2
    assert b"Mine." in hub.repo("user/x").files()["README.md"]
    # a card that we wrote from other numbers is ours
    assert cli("card", run, "--repo-id", "user/x", "--yes").code == cli("card", run).code == 0


def test_a_card_without_a_report_or_with_a_bad_name_is_one_line(refusal, run, tmp_path):
    assert "missing" in refusal("card", tmp_path / "missing")
    assert "report.json" in refusal("card", run / "checkpoint-2")
    before = published(run)
    assert "repo_id 'bad name'" in refusal("card", run, "--repo-id", "bad name")
    assert published(run) == before


# ---- config ----


@pytest.mark.parametrize("method", ["fullrank", "galore", "sltrain"])
def test_config_prints_the_defaults_as_json(method, cli):
    done = cli("config", method)
    assert done.code == 0
    values = json.loads(done.out)
    assert values == lr.LowRankConfig.from_dict(values).to_dict()
    assert values["method"] == method


def test_an_unknown_method_is_one_line_with_the_nearest_name(refusal):
    assert refusal("config", "galor") == (
        f"error: unknown method 'galor' (did you mean 'galore'?); the methods are {', '.join(sorted(REGISTERED))}\n"
    )


# ---- the command itself ----


def test_help_lists_the_commands(cli):
    done = cli("--help")
    assert done.code == 0
    assert all(command in done.out for command in ("push", "load", "card", "config"))


def test_version(cli):
    assert cli("--version").out == f"hf-lowrank {lr.__version__}\n"


def test_every_option_of_a_command_is_a_flag_with_its_help():
    flags = {
        name: {param.opts[0]: param.help for param in command.params if param.param_type_name == "option"}
        for name, command in typer.main.get_command(app).commands.items()
    }
    for name, options in (("measure", MeasureOptions), ("evaluate", EvaluateOptions), ("compare", CompareOptions)):
        described = {flag_name(f): f.metadata["help"] for f in fields(options) if "help" in f.metadata}
        assert described.items() <= flags[name].items()
        # a secret would be read by everybody on the machine
        assert "--token" not in flags[name]


def test_flags_become_the_options_of_their_types():
    words = "a b --tasks x,y --checkpoints 2,4 --seeds 1,1,2 --include_path p --include-path q --batch-size auto"
    read = []

    @with_flags
    def command(runs: list[str], options: EvaluateOptions) -> None:
        read.append((runs, options))

    toy = typer.Typer()
    toy.command()(command)
    assert CliRunner().invoke(toy, words.split()).exit_code == 0
    expected = EvaluateOptions(
        ("x", "y"), (2, 4), seeds=(1, 2), include=(Path("p"), Path("q")), batch_size="auto", device=None
    )
    assert read == [(["a", "b"], expected)]
    CliRunner().invoke(toy, ["a", "--tasks", "x"])
    assert read[1] == (["a"], EvaluateOptions(("x",)))


@pytest.mark.parametrize("argv", [["psh"], ["push"], ["push", "run"], ["config"], ["load", "a", "b"], ["card", "--x"]])
def test_wrong_usage_ends_with_code_2(argv, cli):
    done = cli(*argv)
    assert done.code == 2
    assert done.out == ""
    assert "Traceback" not in done.err
