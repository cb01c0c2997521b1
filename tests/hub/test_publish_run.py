"""A plain Trainer with `lr.attach` and `push_to_hub`: what reaches the Hub while it trains, and what others load."""

import json
import logging
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from huggingface_hub import constants
from loopback_hub import GITATTRIBUTES
from safetensors.torch import load_file
from tiny_runs import METHODS, VOCABULARY, arguments, gpt2, llama, make_trainer, weights
from transformers import Trainer
from typer.testing import CliRunner

import hf_lowrank as lr
import hf_lowrank.run.report
from hf_lowrank.cli import app
from hf_lowrank.hub import network
from hf_lowrank.methods.base import ReparameterizedLinear
from hf_lowrank.models import build_model
from hf_lowrank.report.baseline import baseline_of
from hf_lowrank.report.io import write_report

PNG = b"\x89PNG\r\n\x1a\n\0stand-in"
IDS = torch.arange(24).reshape(2, 12) * 5 % VOCABULARY


def draw_a_stand_in(publish):
    """Figures take seconds to draw, and tests/report/test_figures.py looks at them."""
    (publish / "figures").mkdir(exist_ok=True)
    (publish / "figures" / "loss.png").write_bytes(PNG)
    return [publish / "figures" / "loss.png"]


@pytest.fixture(autouse=True, scope="module")
def _quick_figures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_lowrank.run.report, "draw_figures", draw_a_stand_in)
        yield


def trainer_for(config, folder, model=None, callbacks=(), **changes):
    """An attached Trainer that saves and pushes twice in four steps, unless told otherwise."""
    saving = dict(save_strategy="steps", save_steps=2, max_steps=4, push_to_hub=True)
    trainer = make_trainer(config, arguments(folder, **{**saving, **changes}), model=model)
    lr.attach(trainer, *callbacks)
    return trainer


def published(folder):
    """Path and content of everything in a run's publish folder."""
    publish = folder / "publish"
    return {path.relative_to(publish).as_posix(): path.read_bytes() for path in publish.rglob("*") if path.is_file()}


def held_by(repo, revision="main"):
    """Path and content of everything in a repo but what the Hub itself put there."""
    files = repo.files(revision)
    assert files.pop(".gitattributes") == GITATTRIBUTES
    return files


# ---- what others load: every case is trained and pushed once, and loaded without hf_lowrank in one process ----

CASES = {
    "fullrank": (METHODS["fullrank"], llama),
    "galore": (METHODS["galore"], llama),
    "sltrain": (METHODS["sltrain"], llama),
    # Conv1D layers, biases and tied embeddings
    "galore-gpt2": (METHODS["galore"], gpt2),
    "sltrain-gpt2": (METHODS["sltrain"], gpt2),
    # as transformers makes it: `.bfloat16()` would round the rotary embedding's frequencies, which are not saved
    "sltrain-bf16": (METHODS["sltrain"], lambda: build_model(llama().config, 0, dtype=torch.bfloat16)),
}
SLTRAIN = [case for case in CASES if case.startswith("sltrain")]

WITHOUT_HF_LOWRANK = """
import json, sys
sys.modules["hf_lowrank"] = None
import torch
from transformers import AutoModelForCausalLM

ids = torch.tensor(json.loads(sys.argv[2]))
found = {}
for repo in sys.argv[3:]:
    model, info = AutoModelForCausalLM.from_pretrained(repo, output_loading_info=True)
    with torch.no_grad():
        logits = model.eval()(ids).logits
    wrong = [str(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]]
    found[repo] = {"logits": logits, "wrong": wrong, "modules": sorted({type(m).__module__ for m in model.modules()})}
torch.save(found, sys.argv[1])
"""


@torch.no_grad()
def logits_of(model):
    return model.eval()(IDS).logits


@pytest.fixture(scope="module")
def shared(_serving_hub, tmp_path_factory):
    """Case -> the run's folder, the trained model, what the Hub holds and what was loaded from it."""
    root = tmp_path_factory.mktemp("published")
    hub, cases = _serving_hub, {}
    hub.reset(home=root / "hf_home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", hub.token)
        for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
            patch.setattr(constants, name, str(hub.home / "hub"))
        for case, (config, make) in CASES.items():
            folder, repo = root / case, f"user/{case}"
            spectra = [lr.SpectralCallback(every=4)]
            trainer = trainer_for(config, folder, make(), spectra, hub_model_id=repo, hub_strategy="every_save")
            trainer.train()
            cases[case] = SimpleNamespace(
                folder=folder,
                trainer=trainer,
                repo=hub.repo(repo),
                trained=logits_of(trainer.model),
                native=lr.from_pretrained(repo),
                dense=lr.from_pretrained(repo, dense=True),
                older=lr.from_pretrained(repo, revision="step-2"),
                report=lr.load_report(repo),
                older_report=lr.load_report(repo, revision="step-2"),
            )
        command = [sys.executable, "-c", WITHOUT_HF_LOWRANK, str(root / "logits.pt"), json.dumps(IDS.tolist())]
        command += [f"user/{case}" for case in CASES]
        done = subprocess.run(command, env=hub.environment(), cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = torch.load(root / "logits.pt", weights_only=True)
    for case, found in cases.items():
        found.plain = loaded[f"user/{case}"]
    return cases


@pytest.mark.parametrize("case", CASES)
def test_plain_transformers_gives_the_same_logits(case, shared):
    found = shared[case]
    assert found.plain["wrong"] == []
    assert all(not module.startswith("hf_lowrank") for module in found.plain["modules"])
    assert found.plain["logits"].dtype == found.trained.dtype
    assert (found.plain["logits"].float() - found.trained.float()).abs().max() < 1e-4


@pytest.mark.parametrize("case", CASES)
def test_from_pretrained_gives_the_model_as_trained_bit_for_bit(case, shared):
    found = shared[case]
    mine, theirs = found.native.state_dict(), weights(found.trainer.model)
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert mine[name].dtype == tensor.dtype
        assert torch.equal(mine[name], tensor), name
    assert type(found.native) is type(found.trainer.model)
    assert not found.native.training
    assert torch.equal(logits_of(found.native), found.trained)


@pytest.mark.parametrize("case", CASES)
def test_what_is_loaded_as_trained_can_be_trained_on(case, shared):
    model = found = shared[case].native
    expected = dict(shared[case].trainer.model.named_parameters())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(expected)
    replaced = [m for m in found.modules() if isinstance(m, ReparameterizedLinear)]
    assert bool(replaced) == (case in SLTRAIN)
    model(IDS, labels=IDS).loss.backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in model.parameters() if p.grad is not None)
    assert sum(p.grad is not None for p in model.parameters()) == len(expected)
    model.zero_grad()


@pytest.mark.parametrize("case", CASES)
def test_dense_is_a_plain_model_with_the_same_logits(case, shared):
    dense = shared[case].dense
    assert not any(isinstance(m, ReparameterizedLinear) for m in dense.modules())
    assert (logits_of(dense).float() - shared[case].trained.float()).abs().max() < 1e-4
    assert torch.equal(logits_of(dense), shared[case].plain["logits"])


@pytest.mark.parametrize("case", CASES)
def test_a_tag_gives_the_older_weights(case, shared):
    found = shared[case]
    saved = load_file(found.folder / "checkpoint-2" / "model.safetensors")
    older = found.older.state_dict()
    for name, tensor in saved.items():
        assert torch.equal(older[name], tensor), name
    newest = load_file(found.folder / "checkpoint-4" / "model.safetensors")
    assert any(not torch.equal(newest[name], tensor) for name, tensor in saved.items())


@pytest.mark.parametrize("case", CASES)
def test_the_report_comes_back(case, shared):
    found = shared[case]
    run = found.report["run"]
    assert found.report == json.loads((found.folder / "publish" / "report.json").read_text())
    assert (run["method"], run["steps"]) == (case.partition("-")[0], 4)
    assert run["precision"] == ("bfloat16" if case.endswith("bf16") else "float32")
    assert found.older_report["run"]["steps"] == 2
    assert found.older_report.run.checkpoint_of == {"steps": None}
    assert found.report.run.checkpoint_of is None
    values = {entry["name"]: entry["value"] for entry in found.report["metrics"] if entry["step"] == 4}
    assert values["perplexity"] == pytest.approx(torch.tensor(values["validation_loss"]).exp().item(), rel=1e-4)
    assert values["spectral/weight/stable_rank"] > 1


@pytest.mark.parametrize("case", CASES)
def test_publish_and_nothing_else_is_in_the_repo(case, shared):
    found = shared[case]
    files = held_by(found.repo)
    assert files == published(found.folder)
    assert {"README.md", "report.json", "config.json", "model.safetensors", "lowrank_config.json"} <= set(files)
    assert {"figures/loss.png", "metrics/spectral.parquet", "metrics/training.parquet"} <= set(files)
    assert any(path.startswith("native/") for path in files) == (case in SLTRAIN)
    for commit in found.repo.head.history():
        assert not [path for path in commit.files if path.endswith((".bin", ".pt", ".pth")) or "checkpoint" in path]


@pytest.mark.parametrize("case", CASES)
def test_kept_checkpoints_are_tags(case, shared):
    repo = shared[case].repo
    assert set(repo.tags) == {"step-2", "step-4"}
    assert repo.tags["step-4"].oid == repo.head.oid
    assert list(repo.branches) == ["main"]


@pytest.mark.parametrize("case", CASES)
def test_the_card_is_ours(case, shared):
    card = held_by(shared[case].repo)["README.md"].decode()
    assert "- hf-lowrank\n" in card
    assert f'"user/{case}"' in card
    assert "generated_from_trainer" not in card
    assert (shared[case].folder / "publish" / "README.md").read_text() == card
    assert not (shared[case].folder / "README.md").exists(), "Trainer's own card, which it writes before it pushes"


def test_the_best_step_is_on_main_and_under_its_tag(hub, tmp_path):
    best = dict(load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True)
    evaluating = dict(eval_strategy="steps", eval_steps=2, hub_strategy="every_save")
    trainer = trainer_for(METHODS["lora"], tmp_path / "run", **best, **evaluating)
    trainer.train()
    assert trainer.state.best_global_step == 2
    repo = hub.repo("user/run")
    assert set(repo.tags) == {"step-2", "step-4"}
    assert repo.tags["step-2"].oid == repo.head.oid
    assert held_by(repo) == published(tmp_path / "run")
    newest, last = (json.loads(repo.files(tag)["report.json"])["run"] for tag in ("main", "step-4"))
    assert (newest["steps"], newest["best_of"]["steps"], newest["best_of"]["metric"]) == (2, 4, "eval_loss")
    assert (last["steps"], last.get("best_of")) == (4, None)
    assert repo.files("step-4")["model.safetensors"] != repo.files("main")["model.safetensors"]


# ---- when it pushes ----

STRATEGIES = {
    "every_save": ["step 2", "step 4", "end of training"],
    "checkpoint": ["step 2", "step 4", "end of training"],
    "all_checkpoints": ["step 2", "step 4", "end of training"],
    "end": ["end of training"],
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_hub_strategy_says_when(strategy, hub, tmp_path):
    trainer = trainer_for(
        METHODS["fullrank"], tmp_path / "run", hub_model_id="user/run", hub_strategy=strategy, hub_private_repo=True
    )
    trainer.train()
    repo = hub.repo("user/run")
    titles = [commit.title for commit in repo.head.history()]
    assert titles[::-1] == ["initial commit", *STRATEGIES[strategy]]
    assert set(repo.tags) == ({"step-4"} if strategy == "end" else {"step-2", "step-4"})
    assert held_by(repo) == published(tmp_path / "run")
    assert repo.private
    assert trainer.args.push_to_hub is False, "Trainer's own pushing is off"
    for commit in repo.head.history():
        assert not [path for path in commit.files if path.endswith((".bin", ".pt", ".pth")) or "checkpoint" in path]


def test_nothing_is_pushed_unless_asked(hub, tmp_path):
    trainer_for(METHODS["fullrank"], tmp_path / "run", push_to_hub=False, hub_model_id="user/run").train()
    assert hub.requests == []
    assert (tmp_path / "run" / "publish" / "README.md").is_file()


def test_trainers_push_to_hub_publishes_the_same(hub, tmp_path):
    trainer = trainer_for(METHODS["sltrain"], tmp_path / "run", push_to_hub=False, hub_model_id="user/run")
    trainer.train()
    commit = trainer.push_to_hub("by hand")
    repo = hub.repo("user/run")
    assert (commit.oid, repo.head.title) == (repo.head.oid, "by hand")
    assert held_by(repo) == published(tmp_path / "run")
    assert set(repo.tags) == {"step-4"}
    assert "- hf-lowrank\n" in held_by(repo)["README.md"].decode()
    loaded = lr.from_pretrained("user/run")
    assert torch.equal(logits_of(loaded), logits_of(trainer.model))


def test_pushing_again_later_changes_nothing_and_keeps_the_baseline(hub, tmp_path):
    trainer = trainer_for(METHODS["fullrank"], tmp_path / "run", push_to_hub=False, hub_model_id="user/run")
    trainer.train()
    report = lr.load_report(tmp_path / "run")
    # as `hf-lowrank measure --baseline` leaves it
    write_report({**report, "baseline": baseline_of(report)}, tmp_path / "run" / "publish" / "report.json")
    commits = [trainer.push_to_hub().oid for _ in range(2)]
    assert len(set(commits)) == 1
    published = lr.load_report("user/run")
    assert published["baseline"]["name"] == report["run"]["name"]
    assert published["run"] == report["run"]


def test_a_repo_without_a_name_is_named_after_the_output_folder(hub, tmp_path):
    trainer_for(METHODS["fullrank"], tmp_path / "my-run", hub_strategy="end").train()
    assert held_by(hub.repo("user/my-run")) == published(tmp_path / "my-run")
    assert 'from_pretrained("user/my-run")' in (tmp_path / "my-run" / "publish" / "README.md").read_text()


class Regression(torch.nn.Module):
    """Has no config.json, whose checkpoints hold weights all the same."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 1)

    def forward(self, x, labels):
        return {"loss": (self.linear(x).squeeze(-1) - labels).square().mean()}


def test_a_model_that_is_not_transformers_has_its_report_pushed(hub, tmp_path, caplog):
    args = arguments(tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=2, push_to_hub=True)
    points = Dataset.from_dict({"x": torch.randn(8, 3).tolist(), "labels": torch.randn(8).tolist()})
    trainer = Trainer(model=Regression(), args=args, train_dataset=points)
    lr.attach(trainer)
    trainer.train()
    assert (tmp_path / "run" / "checkpoint-2" / "model.safetensors").is_file()
    assert {"README.md", "report.json"} <= set(held_by(hub.repo("user/run")))
    assert "failed" not in caplog.text


def test_a_branch_can_be_pushed_to(hub, tmp_path):
    trainer = trainer_for(METHODS["fullrank"], tmp_path / "run", push_to_hub=False, hub_model_id="user/run")
    trainer.train()
    trainer.push_to_hub(revision="trial")
    repo = hub.repo("user/run")
    assert held_by(repo, "trial") == published(tmp_path / "run")
    assert held_by(repo, "main") == {}


def test_a_resumed_run_pushes_on(hub, tmp_path):
    def trainer(**changes):
        names = dict(hub_model_id="user/run", hub_strategy="every_save")
        return trainer_for(METHODS["galore"], tmp_path / "run", **names, **changes)

    trainer(max_steps=4).train()
    first = hub.repo("user/run").tags["step-2"].oid
    second = trainer(max_steps=6)
    second.train(resume_from_checkpoint=lr.last_checkpoint(tmp_path / "run"))
    repo = hub.repo("user/run")
    assert set(repo.tags) == {"step-2", "step-4", "step-6"}
    assert repo.tags["step-2"].oid == first
    assert held_by(repo) == published(tmp_path / "run")
    assert lr.load_report("user/run")["run"]["steps"] == 6


# ---- when the Hub fails ----


@pytest.fixture
def impatient(monkeypatch):
    """Seconds between two tries become hundredths."""
    monkeypatch.setattr(network, "FIRST_WAIT", 0.01)


def saving(folder, **changes):
    names = dict(hub_model_id="user/run", hub_strategy="every_save")
    return trainer_for(METHODS["fullrank"], folder, **{**names, **changes})


def test_a_failing_hub_never_stops_training_and_the_log_says_how_to_push(hub, tmp_path, caplog, impatient):
    trainer = saving(tmp_path / "run", hub_revision="trial", hub_private_repo=True)
    hub.fail(".", status=503, times=10_000)
    with caplog.at_level(logging.WARNING, logger="hf_lowrank"):
        result = trainer.train()
    assert result.global_step == 4
    assert held_by(hub.repo("user/run")) == {}, "made by the Trainer when it was set up"
    failures = [r.getMessage() for r in caplog.records if "push to user/run failed" in r.getMessage()]
    # at a save, perhaps at the next if the first had failed by then, and at the end
    assert 2 <= len(failures) <= 3
    assert "the Hub answers 503" in failures[0]
    command = re.search(r"hf-lowrank push .*", failures[-1])[0]
    same = ["--revision", "trial", "--private", "--checkpoints"]
    assert shlex.split(command) == ["hf-lowrank", "push", str(tmp_path / "run"), "--repo-id", "user/run", *same]
    assert not list((tmp_path / "run").glob(".pushing*"))

    hub.faults.clear()
    done = CliRunner().invoke(app, shlex.split(command)[1:], catch_exceptions=False)
    assert done.exit_code == 0
    repo = hub.repo("user/run")
    assert held_by(repo, "trial") == published(tmp_path / "run")
    assert set(repo.tags) == {"step-2", "step-4"}


def test_what_failed_at_a_save_is_made_up_for_later_with_its_tag(hub, tmp_path, caplog, impatient):
    trainer = saving(tmp_path / "run")
    hub.fail("POST /api/models/user/run/commit/", status=503, times=3)
    with caplog.at_level(logging.WARNING, logger="hf_lowrank"):
        trainer.train()
    assert caplog.text.count("push to user/run failed") == 1
    repo = hub.repo("user/run")
    assert held_by(repo) == published(tmp_path / "run")
    assert [commit.title for commit in repo.head.history()][-2::-1] == ["step 2", "step 4", "end of training"]
    assert set(repo.tags) == {"step-2", "step-4"}


def test_a_silent_hub_does_not_hold_up_training(hub, tmp_path, caplog, monkeypatch):
    """What is pushed is the state of the save, not what is written while the Hub keeps silent."""
    trainer = saving(tmp_path / "run", save_steps=1, max_steps=3)
    monkeypatch.setattr(network, "SILENCE", 1.0)
    hub.stall("POST /api/repos/create", seconds=2.0)
    steps_done = []
    hub.meanwhile("POST /api/models/user/run/preupload/", lambda: steps_done.append(trainer.state.global_step))
    with caplog.at_level(logging.WARNING, logger="hf_lowrank"):
        trainer.train()
    assert caplog.text.count("push to user/run failed") == 1
    assert "the Hub does not answer" in caplog.text
    assert steps_done[0] >= 2, "training went on meanwhile"
    repo = hub.repo("user/run")
    assert set(repo.tags) == {"step-1", "step-2", "step-3"}
    for step in (1, 2, 3):
        assert json.loads(repo.files(f"step-{step}")["report.json"])["run"]["steps"] == step


def test_a_hub_that_dies_in_an_upload_and_comes_back(hub, tmp_path, caplog, impatient):
    trainer = saving(tmp_path / "run")
    hub.die_at("PUT /lfs/", after=100, back_after=1.5)
    trainer.train()
    repo = hub.repo("user/run")
    assert held_by(repo) == published(tmp_path / "run")
    assert set(repo.tags) == {"step-2", "step-4"}


def test_somebody_elses_repo_is_left_alone_and_training_goes_on(hub, tmp_path, caplog):
    hub.plant("user/run", {"README.md": b"# theirs"})
    with caplog.at_level(logging.WARNING, logger="hf_lowrank"):
        result = saving(tmp_path / "run", hub_strategy="end").train()
    assert result.global_step == 4
    assert hub.repo("user/run").files()["README.md"] == b"# theirs"
    assert caplog.text.count("hf_lowrank did not push (README.md)") == 1
    assert "--yes" in caplog.text


def test_a_token_without_rights_never_stops_training_nor_shows(hub, tmp_path, caplog, monkeypatch):
    secret = "hf_" + "a1B2" * 9
    trainer = saving(tmp_path / "run", hub_strategy="end", hub_token=hub.token)
    trainer.args.hub_token = secret
    with caplog.at_level(logging.DEBUG):
        trainer.train()
    assert caplog.text.count("push to user/run failed") == 1
    assert "401" in caplog.text
    assert secret not in caplog.text
    texts = [path for path in (tmp_path / "run" / "publish").rglob("*") if path.suffix in (".json", ".md")]
    assert texts
    assert not any(secret in path.read_text() for path in texts)
