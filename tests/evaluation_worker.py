"""What every process of a torchrun launch does in the tests of shared evaluations; one launch runs all cases.

Usage: torchrun --nproc_per_node N evaluation_worker.py TASKS FOLDER. FOLDER/evaluated-<world>.json gets every number,
of models that FSDP2 shards and of a run under DDP.
"""

import copy
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from sharded_worker import mesh
from tiny_runs import METHODS, arguments, llama, make_trainer
from tiny_tasks import tokenizer
from torch.distributed.fsdp import fully_shard
from transformers import TrainerState

import hf_lowrank as lr


def callback(tasks):
    names = ["tiny_group", "cloze", "a"]
    return lr.EvaluationCallback(names, 2, limit=8, include_path=tasks, tokenizer=tokenizer(), budget=None)


def sharded(kind, tasks, folder):
    args = arguments(folder / "unused", log_level="error")
    model, _ = lr.prepare(
        llama(max_position_embeddings=160, attention_dropout=0.0).to(torch.float64), METHODS[kind], args
    )
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh())
    fully_shard(model, mesh=mesh())
    return callback(tasks).measure(model, args, TrainerState())


def main():
    tasks, folder = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world, found = dist.get_world_size(), {}
    for kind in ("fullrank", "sltrain"):
        found |= {f"{kind} {r.name}": r.value for r in sharded(kind, tasks, folder).records}
    args = arguments(
        folder / f"trained-{world}", max_steps=2, per_device_train_batch_size=4 // world, ddp_backend="gloo",
        log_level="error",
    )  # fmt: skip
    trainer = make_trainer(
        METHODS["sltrain"], args, model=llama(max_position_embeddings=160, attention_dropout=0.0).to(torch.float64)
    )
    made = callback(tasks)
    trainer.add_callback(made)
    trainer.train()
    assert made.failed is None, made.failed
    history = {k: v for entry in trainer.state.log_history for k, v in entry.items() if k.startswith("eval_")}
    found |= {f"trained {key}": value for key, value in history.items()}
    if dist.get_rank() == 0:
        (folder / f"evaluated-{world}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
