"""A tiny model, tiny data and a Trainer on them, for tests that train for a few steps."""

import torch
from datasets import Dataset
from transformers import GPT2Config, LlamaConfig, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

import hf_lowrank as lr
from hf_lowrank.methods import ProjectedConfig

VOCABULARY, LENGTH = 64, 16

METHODS = {
    "fullrank": lr.FullRankConfig(),
    "galore": lr.GaLoreConfig(r=4, update_proj_gap=3),
    "galore-subspace": lr.GaLoreConfig(r=4, update_proj_gap=3, refresh="subspace"),
    "galore-full": lr.GaLoreConfig(r=4, update_proj_gap=3, proj_type="full", other_lr_scale=2),
    "golore": lr.GaLoreConfig(
        r=4, update_proj_gap=3, projection="sampled", random_after=0.5, rotate_moments=True, stagger_refreshes=True
    ),
    "fira": lr.FiraConfig(r=4, update_proj_gap=3),
    "frugal": lr.FrugalConfig(r=4, update_proj_gap=3),
    "apollo": lr.ApolloConfig(r=4, update_proj_gap=3),
    "apollo-mini": lr.ApolloConfig(r=1, update_proj_gap=3, scale=128, scale_type="tensor"),
    "sltrain": lr.SLTrainConfig(r=4, sparsity=0.1),
    "muon": lr.MuonConfig(),
    "stable_spam": lr.StableSpamConfig(reset_every=3),
    "lowrank": lr.LowRankFactorsConfig(r=4, alpha=4, refactorize_every=3, reset_moments_every=3),
    "loro": lr.LoroConfig(r=4, exact_every=3, restart_warmup_steps=1),
    "cola": lr.CoLAConfig(r=4),
    "cola-m": lr.CoLAConfig(r=4, recompute=True),
    "lora": lr.LoRAConfig(r=4),
    "relora": lr.ReLoRAConfig(r=4, reset_every=3, restart_warmup_steps=1, other_lr_scale=0.5),
}


def projected(config):
    """Whether the method projects gradients."""
    return isinstance(config, ProjectedConfig)


def restarted(config):
    """Whether the method merges its factors and starts them anew."""
    return isinstance(config, lr.ReLoRAConfig)


def kind(config):
    """What sets methods apart in what they do to model and optimizer."""
    factored = config.replaces_layers and not config.keeps_weights and config.has_dense_form
    return "projected" if projected(config) else "restarted" if restarted(config) else "factored" if factored else ""


def optimizers():
    """The optimizer classes of the projected methods."""
    return list(dict.fromkeys(config.optimizer_cls for config in METHODS.values() if projected(config)))


def llama(seed=0, **changes):
    """A Llama of 2 layers; grouped-query attention, so that not all shapes are alike."""
    set_seed(seed)
    values = dict(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, bos_token_id=0, eos_token_id=0, attention_dropout=0.1,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(LlamaConfig(**{**values, **changes}))


def gpt2(seed=0):
    """A GPT-2 of 2 layers: Conv1D layers, tied embeddings, dropout."""
    set_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    return AutoModelForCausalLM.from_config(config)


def dataset(rows=32, seed=0):
    """Rows whose next token depends on the last one, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, VOCABULARY, (rows, 1), generator=generator)
    ids = (start + 7 * torch.arange(LENGTH)) % VOCABULARY
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})


def arguments(output_dir, **changes):
    """Quiet arguments for a handful of steps."""
    values = dict(
        output_dir=str(output_dir), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False, use_cpu=True, seed=1,
        lr_scheduler_type="cosine", warmup_steps=2, weight_decay=0.1, max_grad_norm=1.0,
    )  # fmt: skip
    return TrainingArguments(**{**values, **changes})


def make_trainer(config, args, model=None, rows=32, **kwargs):
    """A plain Trainer on a prepared model."""
    model, trainer_kwargs = lr.prepare(llama() if model is None else model, config, args)
    return Trainer(
        model=model,
        args=args,
        train_dataset=dataset(rows),
        eval_dataset=dataset(8, seed=1),
        **trainer_kwargs,
        **kwargs,
    )


class Kill(TrainerCallback):
    """Ends the process's part in the run, as a kill does."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def weights(model):
    """A copy of the state dict."""
    return {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
