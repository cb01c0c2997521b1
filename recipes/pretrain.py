"""Pre-train a causal language model with a low-rank method, watch its spectra, publish the run.

    accelerate launch recipes/pretrain.py                                   # embedded default: no download, CPU
    accelerate launch recipes/pretrain.py --method sltrain --sparsity 0.05
    accelerate launch recipes/pretrain.py recipes/configs/60m/galore.yaml --output_dir runs/galore

A YAML file may come first; flags override it. `--help` lists all flags of the chosen `--method`.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# torch reads this at import: threads that spin while they wait make a step several times slower as soon as anything
# else runs on the machine
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import datasets
import huggingface_hub
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers.utils import logging as transformers_logging

import hf_lowrank as lr
from hf_lowrank.arguments import Recipe, RecipeArguments, parse_recipe
from hf_lowrank.checkpoints import list_checkpoints
from hf_lowrank.cli import fail
from hf_lowrank.data import Data, load_data
from hf_lowrank.downstream.quick.generate import task_folder
from hf_lowrank.evaluation.perplexity import perplexity_metrics
from hf_lowrank.hub.card import set_card_aside
from hf_lowrank.machine import keep_freed_memory, use_cores
from hf_lowrank.models import build_model, model_config, needed_vocabulary
from hf_lowrank.report.io import read_report

CONFIGS = Path(__file__).parent / "configs"
# the files that a run leaves in its folder, and that --overwrite removes
RUN_FILES = (
    "checkpoint-*", "publish", "spectral_snapshots", "interpolation_snapshots", "*.safetensors", "config.json",
    "training_args.bin", "evaluation.parquet", "measured.json",
)  # fmt: skip


def split_batch(args: TrainingArguments, total: int | None) -> None:
    """Set the batch per device and the gradient accumulation so that one step sees `total` sequences."""
    if total is None:
        return
    world = args.world_size
    if total % world:
        raise ValueError(f"--total_batch_size {total} cannot be shared among {world} processes: give a multiple")
    args.per_device_train_batch_size = min(args.per_device_train_batch_size, total // world)
    per_step = args.per_device_train_batch_size * world
    if total % per_step:
        raise ValueError(
            f"--total_batch_size {total} is no multiple of {per_step} (--per_device_train_batch_size "
            f"{args.per_device_train_batch_size} on {world} processes): change one of them"
        )
    args.gradient_accumulation_steps = total // per_step


def starting_point(args: TrainingArguments, overwrite: bool) -> str | None:
    """The checkpoint to resume from, or None; refuses a folder that holds a run unless a flag says what to do."""
    folder = Path(str(args.output_dir))
    resume = args.resume_from_checkpoint
    if resume and overwrite:
        raise ValueError("--overwrite and --resume_from_checkpoint exclude each other: drop one")
    if resume and resume.lower() not in ("last", "true"):
        lr.check_checkpoint(resume)
        return resume
    if resume:
        checkpoint = lr.last_checkpoint(folder)
        if checkpoint is None and (cut_short := list_checkpoints(folder)):
            # raises an error that names the fault of the newest: starting anew would overwrite it
            lr.check_checkpoint(cut_short[-1])
        return checkpoint
    held = run_files(folder)
    if held and not overwrite:
        raise ValueError(
            f"{folder} already holds a run ({held[0].name}): pass --resume_from_checkpoint last to resume it, "
            "--overwrite to start anew, or another --output_dir"
        )
    return None


def is_finished(args: TrainingArguments, checkpoint: str | None) -> bool:
    """Whether a checkpoint holds the run's last step and the report is written: Trainer would train one more step."""
    if checkpoint is None or args.max_steps <= 0:
        return False
    step = json.loads((Path(checkpoint) / "trainer_state.json").read_text())["global_step"]
    try:
        written = read_report(Path(str(args.output_dir))).run.steps_done
    except (OSError, ValueError):
        return False
    return bool(step >= args.max_steps and written >= step)


def run_files(folder: Path) -> list[Path]:
    """The files of an earlier run in its folder."""
    return sorted(path for pattern in RUN_FILES for path in folder.glob(pattern))


def remove_run(args: TrainingArguments) -> None:
    """Remove an earlier run for `--overwrite`; called when the set-up of the new run has succeeded."""
    if args.process_index != 0:
        return
    set_card_aside(Path(str(args.output_dir)) / "publish")
    for path in run_files(Path(str(args.output_dir))):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def metric_callbacks(recipe: RecipeArguments, data: Data) -> list[TrainerCallback]:
    """Callbacks of the chosen metrics, in the order of the report."""
    validation: Any = data.validation
    every, few = recipe.metrics_every, {"sequences": recipe.metrics_sequences, "budget": recipe.metrics_budget}
    factories: dict[str, Callable[[], TrainerCallback]] = {
        "spectral": lambda: lr.SpectralCallback(every, budget=recipe.metrics_budget),
        "landscape": lambda: lr.LandscapeCallback(validation, every, **few),
        "interpolation": lambda: lr.InterpolationCallback(validation, **few),
        "activation": lambda: lr.ActivationCallback(validation, str(recipe.baseline), every, **few),
        "curvature": lambda: lr.CurvatureCallback(validation, every, **{**few, "sequences": 4}),
        "downstream": lambda: lr.EvaluationCallback(
            recipe.metrics_tasks,
            every,
            limit=recipe.metrics_limit,
            # our own tasks with items from files that this run does not train on
            include_path=task_folder(data.description),
            budget=recipe.metrics_budget,
        ),
    }
    return [make() for name, make in factories.items() if name in recipe.metrics]


def share_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a model its tokenizer's special tokens; Trainer would do so with a warning that is of no use here."""
    for config in (model.config.get_text_config(), model.generation_config):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if config is not None and getattr(tokenizer, name) is not None:
                setattr(config, name, getattr(tokenizer, name))


def check_tokenizer(source: str, data: Data) -> None:
    """Refuse weights that were trained with another tokenizer, where their report names it."""
    folder = Path(source)
    try:
        # a checkpoint's run has the report
        known = lr.load_report(folder.parent if folder.name.startswith("checkpoint-") else source).data
    # a plain model has none
    except (OSError, ValueError):
        return
    theirs, own = known.tokenizer_hash if known else None, data.description["tokenizer_hash"]
    if theirs and own and theirs != own:
        raise ValueError(
            f"--init_from {source} was trained with another tokenizer (hash {theirs[:12]}, here {own[:12]}), so that "
            "its embeddings mean other tokens: give its tokenizer with --tokenizer_name"
        )


def quiet_progress() -> None:
    """Show no bar for what takes a moment, and none at all in a log file."""
    transformers_logging.set_verbosity_warning()
    transformers_logging.disable_progress_bar()
    if sys.stderr.isatty():
        # which the line before has switched off
        huggingface_hub.utils.enable_progress_bars()
    else:
        datasets.disable_progress_bars()


def set_up(recipe: Recipe) -> tuple[Trainer, str | None]:
    """Prepare data, model, method and output folder: every error of a user is raised here, before training."""
    args = recipe.training
    size = recipe.recipe.model_size or "tiny"
    if args.device.type == "cpu":
        keep_freed_memory()
        use_cores(recipe.recipe.cpu_threads)
    split_batch(args, recipe.recipe.total_batch_size)
    checkpoint = starting_point(args, recipe.recipe.overwrite)
    with args.main_process_first(desc="loading the data"):
        data: Data = load_data(recipe.data, recipe.recipe.data_cache)
    config = model_config(
        recipe.recipe.model_config or size,
        needed_vocabulary(data.tokenizer),
        recipe.data.sequence_length,
        data.tokenizer.eos_token_id,
    )
    start = recipe.recipe.init_from
    if start is not None and checkpoint is not None:
        # what the run started from is in its checkpoint, and need not be there any more
        start = checkpoint
    elif start is not None:
        check_tokenizer(start, data)
    model, trainer_kwargs = lr.prepare(build_model(config, args.seed), recipe.method, args, init_from=start)
    share_special_tokens(model, data.tokenizer)
    if checkpoint is not None:
        lr.check_resume(checkpoint, model)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.validation,
        processing_class=data.tokenizer,
        data_collator=default_data_collator,
        **perplexity_metrics(),
        **trainer_kwargs,
    )
    info = lr.RunInfo(
        name=args.run_name or Path(args.output_dir).name,
        data=data.description,
        model_size=None if recipe.recipe.model_config else size,
        command=["accelerate", "launch", "recipes/pretrain.py", *recipe.command],
        license=recipe.recipe.license,
    )
    lr.attach(
        trainer, *metric_callbacks(recipe.recipe, data), run=info, console=True, log_figures=recipe.recipe.log_figures
    )
    return trainer, checkpoint


def main() -> None:
    """Parse, set up, train; an error before training is printed in one line and ends with exit code 2."""
    quiet_progress()
    main_process = int(os.environ.get("RANK", "0")) == 0
    try:
        recipe = parse_recipe(sys.argv[1:], CONFIGS)
        if main_process and recipe.source is not None:
            print("\n".join([f"settings from {recipe.source}", *recipe.notes]))
        trainer, checkpoint = set_up(recipe)
        if recipe.recipe.overwrite:
            remove_run(recipe.training)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        fail(error, main_process)
    if is_finished(recipe.training, checkpoint):
        if main_process:
            print(
                f"{checkpoint} is the last of {recipe.training.max_steps} steps: nothing to do, or raise --max_steps"
            )
        return
    if main_process and checkpoint is not None:
        print(f"going on from {checkpoint}")
    trainer.train(resume_from_checkpoint=checkpoint)


if __name__ == "__main__":
    main()
