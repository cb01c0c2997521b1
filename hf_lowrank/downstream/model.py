"""The harness's model: a run as it was trained, in its native or its dense form.

Importing this module registers it with the harness as `hf-lowrank`.
"""

from collections.abc import Callable
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_lowrank.checkpoints import load_model
from hf_lowrank.families.spaces import is_reparameterized
from hf_lowrank.measure.source import Checkpoint, open_run
from hf_lowrank.methods.base import nearest
from hf_lowrank.metrics.sequences import check_next_token

__all__ = ["DTYPES", "FORMS", "LowRankLM", "load_checkpoint", "load_tokenizer", "model_facts"]

FORMS = ("native", "dense")
DTYPES = ("auto", "float32", "bfloat16", "float16")
# arguments of HFLM that mean something for a model that is made already
_HANDED_ON = (
    *("batch_size", "max_batch_size", "max_length", "truncation", "logits_cache", "softmax_dtype", "add_bos_token"),
    *("mixed_precision_dtype", "prefix_token_id", "think_end_token", "enable_thinking", "chat_template_args"),
)


def load_checkpoint(checkpoint: Checkpoint, form: str, dtype: str, device: str) -> PreTrainedModel:
    """A checkpoint's model, ready to answer.

    Args:
        checkpoint: of a run.
        form: `native`, as trained, or `dense`.
        dtype: `auto` for the one that it was saved in.
        device: where to put it.

    Raises:
        CheckpointError: it is damaged, or has no such form.
        ValueError: no such form or dtype.
    """
    for name, value, known in (("form", form, FORMS), ("dtype", dtype, DTYPES)):
        if value not in known:
            raise ValueError(f"{name} {value}{nearest(value, list(known))}: it is one of {', '.join(known)}")
    model = load_model(checkpoint.folder, dense=form == "dense")
    if dtype != "auto":
        # parameters alone: a cast of the whole model would round its rotary frequencies as well
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(getattr(torch, dtype))
    moved: PreTrainedModel = model.to(device)  # type: ignore[arg-type]
    return moved


def load_tokenizer(checkpoint: Checkpoint, name: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer of that name, or the one beside a checkpoint's weights.

    Raises:
        ValueError: there is none.
    """
    if name is None and not list(checkpoint.folder.glob("tokenizer*")):
        raise ValueError(
            f"{checkpoint.folder} holds no tokenizer: name the one it was trained with (--tokenizer-name)"
        )
    return AutoTokenizer.from_pretrained(name or checkpoint.folder, trust_remote_code=False)


def model_facts(model: Any) -> dict[str, str]:
    """What the rows say of the model: the form of its weights and their type."""
    form = "native" if is_reparameterized(model) else "dense"
    return {"form": form, "dtype": str(model.dtype).removeprefix("torch.")}


@register_model("hf-lowrank")
class LowRankLM(HFLM):
    """A model of a run for the harness.

    In the harness's own command line: `--model hf-lowrank --model_args pretrained=RUN,form=dense`.

    Args:
        pretrained: a run, publish or checkpoint folder, a Hub repository (also `user/name@revision`), of which the
            newest checkpoint is taken, or a model.
        tokenizer: its name, or itself; default: the run's.
        revision: of a Hub repository.
        form: `native`, as trained, or `dense`.
        dtype: `auto` for the one it was saved in.
        device: default: a GPU if there is one.
        progress: called at every forward pass.
        trust_remote_code: for data sets; no code of a model is run.
        **kwargs: HFLM's arguments for a model that is made already: batch_size, max_length, ...

    Raises:
        ValueError: an argument that is not known, or means nothing here; a model that predicts no next token, or sees
            the tokens that it is to predict.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        *,
        revision: str | None = None,
        form: str = "native",
        dtype: str = "auto",
        device: str | None = None,
        progress: Callable[[], Any] | None = None,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> None:
        for name in kwargs:
            if name not in _HANDED_ON:
                known = [*_HANDED_ON, "pretrained", "tokenizer", "revision", "form", "dtype", "device"]
                raise ValueError(f"model_args {name}{nearest(name, known)}: hf-lowrank takes {', '.join(known)}")
        if isinstance(pretrained, str):
            source = pretrained if revision in (None, "main") else f"{pretrained}@{revision}"
            checkpoint = open_run(source).final
            # the harness's command line says cuda:0 where nobody asked for anything
            if device is None or (device.startswith("cuda") and not torch.cuda.is_available()):
                device = "cuda" if torch.cuda.is_available() else "cpu"
            pretrained = load_checkpoint(checkpoint, form, dtype, device)
            if tokenizer is None or isinstance(tokenizer, str):
                tokenizer = load_tokenizer(checkpoint, tokenizer)
        self._progress = progress
        if kwargs.get("add_bos_token") is None and _appends_end(tokenizer):
            kwargs["add_bos_token"] = False
        super().__init__(pretrained=pretrained, tokenizer=tokenizer, **kwargs)
        # an answer's likelihood is read off the logits of the next token
        if self.backend == "causal":
            check_next_token(self.model, {"input_ids": torch.arange(12)[None] % self.vocab_size})

    def _model_call(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._progress is not None:
            self._progress()
        return super()._model_call(*args, **kwargs)

    def _model_generate(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._progress is not None:
            self._progress()
        return super()._model_generate(*args, **kwargs)

    def overlong(self, requests: list[Instance]) -> int:
        """How many requests do not fit into the model's context: the harness cuts them on the left, and says nothing.

        Rolling likelihoods are cut into windows, and lose nothing.
        """
        cut = 0
        for request in requests:
            if request.request_type == "loglikelihood":
                context, continuation = request.args
                # no successor is asked for of the last token, and an empty context becomes one token
                length, room = len(self.tok_encode(context + continuation)) - (context != ""), self.max_length
                cut += length > room
            elif request.request_type == "generate_until":
                context, options = request.args
                cut += len(self.tok_encode(context)) > self.max_length - self._generated(options)
        return cut

    def longest_answer(self, requests: list[Instance]) -> int:
        """Tokens of the longest answer that is scored or generated; at least one token of context comes on top."""
        longest = 0
        for request in requests:
            if request.request_type == "loglikelihood":
                context, continuation = request.args
                whole, given = len(self.tok_encode(context + continuation)), len(self.tok_encode(context))
                longest = max(longest, whole - given)
            elif request.request_type == "generate_until":
                longest = max(longest, self._generated(request.args[1]) + 1)
        return longest

    def _generated(self, options: dict[str, Any]) -> int:
        return int(options.get("max_gen_toks") or options.get("max_new_tokens") or self.max_gen_toks)


def _appends_end(tokenizer: Any) -> bool:
    """Whether a tokenizer ends all it encodes with a token of its own, as T5's does.

    The harness takes an answer's tokens to be those behind the context's: with an end token behind the context, every
    answer would lose its first token.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return False
    ids = tokenizer.encode("a")
    return bool(ids) and ids[-1] == tokenizer.eos_token_id
