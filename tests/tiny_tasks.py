"""A tokenizer for the tiny models and small tasks over local files, one of every kind the harness has."""

import json
import random
from pathlib import Path

from tiny_runs import VOCABULARY
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 .,:;?!'\"()[]+-*/=_\n"

# what a task's own code does: it notes that it ran, and fails or ends the process where it is told to
CODE = """
import os, signal
from pathlib import Path

def process(docs):
    return docs

def _results(name, doc, results):
    with (Path(__file__).parent / "answered.log").open("a") as log:
        log.write(name + "\\n")
    if os.environ.get("FAIL_IN") == name:
        raise RuntimeError("this task is broken")
    if os.environ.get("DIE_IN") == name:
        os.kill(os.getpid(), signal.SIGKILL)
    likelihoods = [likelihood for likelihood, _ in results]
    return {"acc": float(likelihoods.index(max(likelihoods)) == doc["label"])}
"""

PAIRS = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    train: {data}
    test: {data}
training_split: train
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: text
doc_to_target: label
doc_to_choice: choices
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
{more}
metadata:
  version: 1.0
  chance: 0.5
"""

CLOZE = """
task: cloze
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: loglikelihood
doc_to_text: text
doc_to_target: "{{{{choices[label]}}}}"
target_delimiter: ""
metric_list:
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 2
"""

ROLLING = """
task: rolling
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list:
  - metric: bits_per_byte
    aggregation: bits_per_byte
    higher_is_better: false
metadata:
  version: 0
"""

GENERATED = """
task: generated
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: text
doc_to_target: "{{{{choices[label]}}}}"
target_delimiter: ""
generation_kwargs:
  max_gen_toks: 4
  do_sample: false
  until: ["."]
filter_list:
  - name: whole
    filter:
      - function: take_first
  - name: first
    filter:
      - function: regex
        regex_pattern: "(.)"
      - function: take_first
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""

GROUP = """
group: tiny_group
task: [pairs, shots]
aggregate_metric_list:
  - metric: acc
    weight_by_size: true
metadata:
  version: 3
"""

REMOTE = """
task: remote
dataset_path: somebody/questions
test_split: test
output_type: multiple_choice
doc_to_text: text
doc_to_target: label
doc_to_choice: choices
metadata:
  version: 1.0
"""


def tokenizer(**changes):
    """One token a character, `</s>` as token 0."""
    vocabulary = {"</s>": 0, **{letter: i for i, letter in enumerate(LETTERS, 1)}, "?unknown": VOCABULARY - 1}
    assert len(LETTERS) < VOCABULARY - 2
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="?unknown"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{"eos_token": "</s>", "pad_token": "</s>", "model_input_names": ["input_ids", "attention_mask"], **changes},
    )


def write_tasks(folder: Path, items: int = 24) -> Path:
    """The tasks pairs, shots (two examples in the prompt), cloze, rolling, generated, remote, a to e, two groups."""
    folder.mkdir(parents=True, exist_ok=True)
    draw, rows = random.Random(0), []
    for _ in range(items):
        text = "".join(draw.choices(LETTERS[:26], k=draw.randint(4, 12)))
        choices = ["".join(draw.sample(LETTERS[:26], 2)) for _ in range(2)]
        rows.append({"text": text, "choices": choices, "label": draw.randint(0, 1)})
    data = folder / "items.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "utils.py").write_text(
        CODE + "".join(f"\ndef {n}(doc, results):\n    return _results({n!r}, doc, results)\n" for n in "abcde")
    )
    more = "  - metric: acc_norm\n    aggregation: mean\n    higher_is_better: true"
    texts = {
        "pairs": PAIRS.format(name="pairs", data=data, more=more),
        "shots": PAIRS.format(name="shots", data=data, more="num_fewshot: 2\nfewshot_delimiter: ' '"),
        "cloze": CLOZE.format(data=data),
        "rolling": ROLLING.format(data=data),
        "generated": GENERATED.format(data=data),
        "group": GROUP,
        "unfinished": "group: unfinished\ntask: [hf_lowrank_brackets, hf_lowrank_word]\n",
        "remote": REMOTE,
        **{
            n: PAIRS.format(name=n, data=data, more=f"process_results: !function utils.{n}\ntag: letters")
            for n in "abcde"
        },
    }
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder
