"""Add spectral metrics to a stock Trainer script: a GPT-2 that knows nothing of low-rank methods.

    python recipes/examples/metrics_for_any_trainer.py --output_dir runs/gpt2 --max_steps 20 --report_to tensorboard

The only lines that hf_lowrank asks for are marked. The text is the sources of Python's standard library, so nothing is
downloaded. `--size gpt2` is a GPT-2 of full size, for a GPU or for patience; `--size tiny` (default) is for a CPU.
"""

import argparse

from transformers import AutoModelForCausalLM, GPT2Config, Trainer, TrainingArguments, default_data_collator, set_seed

import hf_lowrank as lr
from hf_lowrank.data import DataArguments, load_data

SIZES = {
    "tiny": {"n_embd": 128, "n_layer": 4, "n_head": 4},
    "gpt2": {"n_embd": 768, "n_layer": 12, "n_head": 12},
}


def main() -> None:
    """Train a few steps and print where the numbers are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/gpt2-spectra")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--max_steps", type=int, default=20)
    parser.add_argument("--every", type=int, default=10, help="optimizer steps between two measurements")
    parser.add_argument("--report_to", default="none", help="tensorboard, trackio, wandb, ... as in TrainingArguments")
    options = parser.parse_args()

    data = load_data(DataArguments(sequence_length=128, max_eval_sequences=16))
    set_seed(0)
    config = GPT2Config(
        vocab_size=len(data.tokenizer),
        n_positions=128,
        bos_token_id=data.tokenizer.eos_token_id,
        eos_token_id=data.tokenizer.eos_token_id,
        **SIZES[options.size],
    )
    args = TrainingArguments(
        output_dir=options.output_dir,
        max_steps=options.max_steps,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        logging_steps=5,
        save_strategy="no",
        report_to=options.report_to,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model=AutoModelForCausalLM.from_config(config),
        args=args,
        train_dataset=data.train,
        eval_dataset=data.validation,
        data_collator=default_data_collator,
        processing_class=data.tokenizer,
    )
    lr.attach(trainer, lr.SpectralCallback(every=options.every))  # <- the spectra, the report and the card
    trainer.train()
    print(f"{options.output_dir}/publish holds report.json, metrics/spectral.parquet, figures and a model card")


if __name__ == "__main__":
    main()
