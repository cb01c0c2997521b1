"""`attach`: metrics, report and publishing for any Trainer, from outside."""

from collections.abc import Sequence
from typing import Any

from huggingface_hub import CommitInfo
from transformers import Trainer, TrainerCallback

from hf_lowrank.conversion import check_names, convert_when_loading
from hf_lowrank.families.callback import MetricCallback
from hf_lowrank.methods.base import MethodCallback
from hf_lowrank.run.facts import RunInfo
from hf_lowrank.run.report import ReportCallback

__all__ = ["attach"]


def attach(trainer: Trainer, *callbacks: TrainerCallback, run: RunInfo | None = None) -> None:
    """Add metric callbacks, the report and publishing to a Trainer, whatever it trains.

    The callbacks log through `trainer.log`, so every reporter shows their numbers. `<output_dir>/publish/` gets the
    report, figures, a model card and the weights. Where `args.push_to_hub` is set, this takes over from Trainer's own
    pushing, follows `args.hub_strategy`, and pushes `publish/` alone; `trainer.push_to_hub()` does the same and
    returns when it is done.

    With the strategy `end` there is one push, after training. With `every_save`, `checkpoint` and `all_checkpoints`,
    which differ for a stock Trainer in where they put its checkpoints, every save is pushed, as one commit under its
    tag `step-<n>`: a tag stays when `save_total_limit` removes the checkpoint. What only resuming needs, such as the
    optimizer's state, is never pushed. Pushes during training go on beside it, in order and one at a time. One that
    fails is logged with the command that repeats it, and tried again at the next save and at the end. A repository
    that holds somebody else's files, or another run, is left alone and the log says so.

    Args:
        trainer: any `transformers.Trainer`, before `train` is called.
        *callbacks: metric callbacks, or any other.
        run: what Trainer does not know about the run.

    Raises:
        ValueError: the Trainer has a report already, something other than a callback was given, or a callback cannot
            measure what this Trainer trains.
    """
    if any(isinstance(callback, ReportCallback) for callback in trainer.callback_handler.callbacks):
        raise ValueError("this Trainer is attached already: give all callbacks to one call of attach")
    _check(callbacks)
    _load_exactly(trainer)
    for callback in callbacks:
        if isinstance(callback, MetricCallback):
            callback.bind(trainer)
    for callback in callbacks:
        trainer.add_callback(callback)
    # a method's own callback, which prepare has handed to the Trainer
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, MethodCallback):
            callback.trainer = trainer
    args = trainer.args
    strategy = str(getattr(args.hub_strategy, "value", args.hub_strategy)) if args.push_to_hub else None
    # Trainer's own pushing rewrites README.md and weights in the root and uploads the root
    args.push_to_hub = False
    if args.include_num_input_tokens_seen == "no":
        args.include_num_input_tokens_seen = "all"
    report = ReportCallback(trainer, run or RunInfo(), strategy)
    trainer.add_callback(report)

    def push_to_hub(
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | None:
        model = report.whole_model()
        if not trainer.is_world_process_zero():
            return None
        report.write_all(model)
        return report.push(commit_message, revision, private, token)

    trainer.push_to_hub = push_to_hub  # type: ignore[method-assign, assignment]


def _load_exactly(trainer: Trainer) -> None:
    """Resuming and loading the best model restore every weight, or raise `CheckpointError`."""
    assert trainer.model is not None
    convert_when_loading(trainer.model)
    call_model_init = trainer.call_model_init

    def converting_model_init(trial: Any = None) -> Any:
        model = call_model_init(trial)
        convert_when_loading(model)
        return model

    def refuse_incomplete(load_result: Any) -> None:
        model = trainer.model
        assert model is not None
        loaded = {name: t for name, t in model.state_dict().items() if name not in load_result.missing_keys}
        check_names(model, loaded, "the checkpoint that Trainer loads")

    trainer.call_model_init = converting_model_init  # type: ignore[method-assign]
    trainer._issue_warnings_after_load = refuse_incomplete  # type: ignore[method-assign]


def _check(callbacks: Sequence[TrainerCallback]) -> None:
    names: set[str] = set()
    for callback in callbacks:
        if not isinstance(callback, TrainerCallback):
            raise ValueError(
                f"{callback!r} is no TrainerCallback: give instances, SpectralCallback(every=500) for one"
            )
        if isinstance(callback, MetricCallback):
            if callback.name in names:
                raise ValueError(f"two {type(callback).__name__} write the same files: {callback.alternative}")
            names.add(callback.name)
