"""`attach`: metrics, report and publishing for any Trainer, from outside."""

import inspect
from collections.abc import Sequence
from typing import Any

from huggingface_hub import CommitInfo
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_lowrank.conversion import convert_when_loading, refuse_incomplete
from hf_lowrank.families.callback import MetricCallback
from hf_lowrank.methods.base import MethodCallback
from hf_lowrank.methods.prepare import check_handed_on, check_method, method_of
from hf_lowrank.methods.recorded import take_start
from hf_lowrank.methods.trainer_arguments import plain
from hf_lowrank.optim.plan import Plan, plan_of
from hf_lowrank.run.console import use_console
from hf_lowrank.run.facts import RunInfo
from hf_lowrank.run.report import ReportCallback
from hf_lowrank.run.speed import SpeedCallback

__all__ = ["attach"]


def attach(
    trainer: Trainer,
    *callbacks: TrainerCallback,
    run: RunInfo | None = None,
    console: bool = False,
    log_figures: bool = False,
) -> None:
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

    A Trainer that takes no `optimizer_cls_and_kwargs` (`Seq2SeqTrainer`, some of TRL's) gets from here what `prepare`
    returned for its model. Before the first step, what trains the model is compared with the method in its config.

    Args:
        trainer: any `transformers.Trainer`, before `train` is called.
        *callbacks: metric callbacks, or any other.
        run: what Trainer does not know about the run.
        log_figures: at the end, log the figures and the table of headline metrics to trackio, Weights & Biases and
            TensorBoard, where Trainer reports to them.
        console: print one short line for each log, in the place of the callbacks by which Trainer prints dictionaries.

    Raises:
        ValueError: the Trainer has a report already, something other than a callback was given, or a callback cannot
            measure what this Trainer trains.
    """
    if any(isinstance(callback, ReportCallback) for callback in trainer.callback_handler.callbacks):
        raise ValueError("this Trainer is attached already: give all callbacks to one call of attach")
    _check(callbacks)
    _hand_on_method(trainer)
    _load_exactly(trainer)
    _add(trainer, callbacks)
    args = trainer.args
    strategy = plain(args.hub_strategy) if args.push_to_hub else None
    # Trainer's own pushing rewrites README.md and weights in the root and uploads the root
    args.push_to_hub = False
    if args.include_num_input_tokens_seen == "no":
        _count_tokens(trainer)
    speed = SpeedCallback(trainer)
    report = ReportCallback(trainer, run or RunInfo(), strategy, speed, log_figures)
    if console:
        use_console(trainer, speed)
    trainer.add_callback(report)
    trainer.add_callback(speed)
    _take_over_pushing(trainer, report)


def _add(trainer: Trainer, callbacks: tuple[TrainerCallback, ...]) -> None:
    """Add a user's callbacks, and let all that need the Trainer know it."""
    for callback in callbacks:
        if isinstance(callback, MetricCallback):
            callback.bind(trainer)
    # before metrics look at the model
    trainer.callback_handler.callbacks.insert(0, _MethodCheck(trainer))
    for callback in callbacks:
        trainer.add_callback(callback)
    # a method's own callback, which prepare has handed to the Trainer
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, MethodCallback):
            callback.trainer = trainer


def _take_over_pushing(trainer: Trainer, report: ReportCallback) -> None:
    """Have `trainer.push_to_hub` write and push what the report publishes."""

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


def _count_tokens(trainer: Trainer) -> None:
    """Have Trainer count tokens and log what it would log without that.

    It would add its speed to every entry of the log, of which its own card would then show none.
    """
    trainer.args.include_num_input_tokens_seen = "all"
    log = trainer.log

    def log_as_before(*args: Any, **kwargs: Any) -> None:
        trainer.args.include_num_input_tokens_seen = "no"
        try:
            log(*args, **kwargs)
        finally:
            trainer.args.include_num_input_tokens_seen = "all"

    trainer.log = log_as_before  # type: ignore[method-assign]


class _MethodCheck(TrainerCallback):
    """Refuses to train with something else than the method in the model's config."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer: Any = getattr(self.trainer.optimizer, "optimizer", self.trainer.optimizer)
        model = self.trainer.accelerator.unwrap_model(self.trainer.model, keep_torch_compile=False)
        check_method(model, optimizer, self.trainer.callback_handler.callbacks, args)


def _hand_on_method(trainer: Trainer) -> None:
    """Give the Trainer the optimizer and callbacks of its model's method where its constructor could not take them.

    Raises:
        ValueError: it could, and they were not handed on.
    """
    model: Any = trainer.model
    config, plan = method_of(model), plan_of(model)
    handed = (trainer.optimizer_cls_and_kwargs or (None, {}))[1].get("plan")
    if isinstance(handed, Plan):
        # these arguments may be others than those that prepare had
        trainer.optimizer_cls_and_kwargs = handed.for_trainer(trainer.args)
    elif plan is not None and trainer.optimizer is None and not _takes_optimizer(type(trainer)):
        trainer.optimizer_cls_and_kwargs = plan.for_trainer(trainer.args)
        assert config is not None
        present = {type(callback) for callback in trainer.callback_handler.callbacks}
        for callback in config.callbacks(trainer.args):
            if type(callback) not in present:
                trainer.add_callback(callback)
    given = trainer.optimizer_cls_and_kwargs
    optimizer_cls: Any = None
    if trainer.optimizer is not None:
        optimizer_cls = type(trainer.optimizer)
    elif given is not None:
        optimizer_cls = given[0]
    elif type(trainer).create_optimizer is Trainer.create_optimizer:
        optimizer_cls = Trainer.get_optimizer_cls_and_kwargs(trainer.args, model)[0]
    # Trainer has optimizers that are made by a function
    if isinstance(optimizer_cls, type) or optimizer_cls is None:
        check_handed_on(model, optimizer_cls, trainer.callback_handler.callbacks, trainer.args)


def _takes_optimizer(trainer_cls: type) -> bool:
    """Whether a Trainer class's constructor takes `optimizer_cls_and_kwargs`, itself or by `**kwargs`."""
    for cls in trainer_cls.__mro__:
        if "__init__" not in vars(cls):
            continue
        parameters = inspect.signature(vars(cls)["__init__"]).parameters
        if "optimizer_cls_and_kwargs" in parameters:
            return True
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return False
    return False


def _load_exactly(trainer: Trainer) -> None:
    """Resuming and loading the best model restore every weight, or raise `CheckpointError`."""
    assert trainer.model is not None
    convert_when_loading(trainer.model)
    call_model_init = trainer.call_model_init

    def converting_model_init(trial: Any = None) -> Any:
        model = call_model_init(trial)
        convert_when_loading(model)
        return model

    load = trainer._load_from_checkpoint

    def load_from_checkpoint(resume_from_checkpoint: str, model: Any = None) -> None:
        assert trainer.model is not None
        take_start(resume_from_checkpoint, trainer.model)
        load(resume_from_checkpoint, model)

    trainer.call_model_init = converting_model_init  # type: ignore[method-assign]
    trainer._load_from_checkpoint = load_from_checkpoint  # type: ignore[method-assign]
    refuse_incomplete(trainer)


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
