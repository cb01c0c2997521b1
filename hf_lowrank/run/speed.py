"""How fast a Trainer trains: tokens, optimizer time and refresh time, measured on the way."""

from functools import partial
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_lowrank.methods.base import MethodCallback
from hf_lowrank.optim.spans import Spans

__all__ = ["SpeedCallback"]


class SpeedCallback(TrainerCallback):
    """Measures the speed of training alone: what validation, metrics and saving take is left out.

    `hf_lowrank.attach` adds it behind all others, so that what they do after a step does not count.

    Args:
        trainer: the Trainer it is attached to.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._restart(0)

    def _restart(self, tokens: int) -> None:
        self.spans = Spans(self.trainer.args.device)
        self._tokens, self._refreshes = tokens, False
        self._mark: Any = None
        self._optimizer_began: Any = None
        # (tokens, seconds) at the last log
        self._logged = (0.0, 0.0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._restart(state.num_input_tokens_seen)
        optimizer: Any = getattr(self.trainer.optimizer, "optimizer", self.trainer.optimizer)
        for refreshing in (optimizer, *self.trainer.callback_handler.callbacks):
            if hasattr(refreshing, "refreshing"):
                refreshing.refreshing = partial(self.spans.span, "refresh")
                self._refreshes |= not isinstance(refreshing, MethodCallback) or refreshing.refreshes
        self._mark = self.spans.now()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._optimizer_began = self.spans.now()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._optimizer_began is None or self._mark is None:
            return
        self.spans.add("optimizer", self._optimizer_began)
        # the first step warms up: it compiles, allocates and fills caches
        first = not (self.spans.amounts["first"] or self.spans.amounts["step"])
        self.spans.add("first" if first else "step", self._mark, state.num_input_tokens_seen - self._tokens)
        self._tokens = state.num_input_tokens_seen

    def _after_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What ran until now was no training."""
        self._mark = self.spans.now()

    # not on_log, which a method calls in the middle of a step as well
    on_step_end = on_evaluate = on_save = _after_step

    def recent(self) -> float | None:
        """Tokens a second since this was asked last."""
        self.spans.collect()
        amounts, lasted = self.spans.amounts, self.spans.seconds
        tokens, seconds = amounts["first"] + amounts["step"], lasted["first"] + lasted["step"]
        (old_tokens, old_seconds), self._logged = self._logged, (tokens, seconds)
        return (
            (tokens - old_tokens) / (seconds - old_seconds) if tokens > old_tokens and seconds > old_seconds else None
        )

    def facts(self) -> dict[str, float | None] | None:
        """The report's `run.speed`; None before the first step."""
        self.spans.collect()
        steps = self.spans.amounts["optimizer"]
        if not steps:
            return None
        # a run of one step has no other than the first
        name = "step" if self.spans.amounts["step"] else "first"
        tokens, seconds = self.spans.amounts[name], self.spans.seconds[name]
        return {
            "tokens_per_second": tokens / seconds if tokens and seconds else None,
            "optimizer_seconds_per_step": self.spans.seconds["optimizer"] / steps,
            "refresh_seconds_per_step": self.spans.seconds["refresh"] / steps if self._refreshes else None,
        }
