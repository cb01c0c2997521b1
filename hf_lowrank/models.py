"""The study's model sizes, and making a model from a size or a config."""

from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from hf_lowrank.options import nearest

__all__ = ["SIZES", "build_model", "model_config", "needed_vocabulary"]

# hidden size, MLP size, heads, layers; `nano` and `tiny` are for the embedded corpus, the others are the study's
SIZES: dict[str, tuple[int, int, int, int]] = {
    "nano": (48, 128, 4, 4),
    "tiny": (128, 344, 4, 4),
    "60m": (512, 1376, 8, 8),
    "130m": (768, 2048, 12, 12),
    "350m": (1024, 2736, 16, 24),
    "1b": (2048, 5461, 32, 24),
}
STUDY_VOCABULARY = 32000


def model_config(
    size_or_path: str, vocabulary: int, sequence_length: int, eos_token_id: int | None
) -> PreTrainedConfig:
    """Config of a model of one of the `SIZES`, or the one in a folder, a JSON file or a Hub repo.

    Args:
        size_or_path: `60m` for example, or the place of a config.
        vocabulary: how many ids the tokenizer can give. A model of a size gets that vocabulary, but from 60m on at
            least the study's 32000; a config's vocabulary must be large enough.
        sequence_length: tokens in a row.
        eos_token_id: of the tokenizer.

    Raises:
        ValueError: unknown size; vocabulary or sequence length do not fit the config.
    """
    if size_or_path in SIZES:
        hidden, mlp, heads, layers = SIZES[size_or_path]
        return LlamaConfig(
            vocab_size=vocabulary if size_or_path in ("nano", "tiny") else max(vocabulary, STUDY_VOCABULARY),
            hidden_size=hidden,
            intermediate_size=mlp,
            num_attention_heads=heads,
            num_hidden_layers=layers,
            max_position_embeddings=max(1024, sequence_length),
            rms_norm_eps=1e-6,
            initializer_range=0.02,
            tie_word_embeddings=False,
            bos_token_id=eos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=None,
        )
    if not Path(size_or_path).exists() and (size_or_path.count("/") != 1 or size_or_path.startswith((".", "/"))):
        raise ValueError(
            f"unknown model '{size_or_path}'{nearest(size_or_path, list(SIZES))}: it is no folder or file, "
            f"no Hub repo (user/name) and none of the sizes {', '.join(SIZES)}"
        )
    try:
        config = AutoConfig.from_pretrained(size_or_path)
    except (OSError, ValueError) as error:
        raise ValueError(f"model_config={size_or_path!r} cannot be read: {str(error).splitlines()[0]}") from error
    text = config.get_text_config()
    if vocabulary > text.vocab_size:
        raise ValueError(
            f"the tokenizer gives ids up to {vocabulary - 1} and the model of {size_or_path} has a vocabulary of "
            f"{text.vocab_size}: name the tokenizer that belongs to it, or raise its vocab_size"
        )
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and positions < sequence_length:
        raise ValueError(f"sequence_length={sequence_length} is above the {positions} positions of {size_or_path}")
    return config


def needed_vocabulary(tokenizer: PreTrainedTokenizerBase) -> int:
    """How large a model's vocabulary must be for this tokenizer's text.

    Special tokens that text never contains do not count, such as the T5 tokenizer's 100 sentinels above the study's
    32000. The marks of a beginning, an end and padding do.
    """
    special = set(tokenizer.all_special_ids)
    marks = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id} - {None}
    return 1 + max(i for i in tokenizer.get_vocab().values() if i not in special or i in marks)


def build_model(config: PreTrainedConfig, seed: int, **kwargs: Any) -> PreTrainedModel:
    """A causal language model with random weights, the same for the same seed.

    `**kwargs` goes to `AutoModelForCausalLM.from_config` (`attn_implementation`, `dtype`).
    """
    set_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **kwargs)
    return model
