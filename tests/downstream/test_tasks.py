"""The tasks of our own: balanced, free of what can be guessed from the answers, from held-out files alone, and usable
by the harness wherever it is started."""

import hashlib
import json
import random
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from hf_lowrank.data import DataArguments, DataError, load_documents
from hf_lowrank.downstream.quick.document import Document
from hf_lowrank.downstream.quick.generate import GROUP, TASKS, generate, main, task_folder
from hf_lowrank.downstream.quick.items import KINDS

ORDER = ("keywords", "operators", "words")  # the wrong answer is the right one's words in another order
SOURCE = json.loads((TASKS / "source.json").read_text())
NAMES = [word + ending for word in ("path", "node", "text", "line", "rank") for ending in ("", "s", "er", "ing")]
WORDS = [word + ending for word in ("small", "large", "early", "plain") for ending in ("", "ly", "er", "est")]


def python_source(seed, functions=60):
    """A module in which every kind of question can be asked many times."""
    texts = [f'"""Functions of module {seed}."""\n']
    for number in range(functions):
        draw = random.Random(f"{seed} {number}")
        one, two, three, four = draw.sample(NAMES, 4)
        first, second, third, fourth = draw.sample(WORDS, 4)
        texts.append(f'''
def {first}_{one}_{number}({one}, {two}, {three}=None):
    {four} = {one}[{two}]
    if {four} is not {three}:
        return {second}({four}, {two})
    {three}.{third}({first}=[{two}])
    {first} = {one} + {second}
    for part in {four}({one}):
        for item in {two}:
            part.{fourth}(item)
    # a {first} {second} comes before every {third} {fourth} here
    # then {third} {second} {first}
    for item in {one}:
        if item not in {two} and {three}:
            {four} = item[{three}]
        print("{first}", '{second}', {four})
        {third}.{fourth}(item, "{third}") if {four} else '{fourth}'
    return {four}
''')
    return "".join(texts)


def items_of(folder):
    return {name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()] for name in KINDS}


PACKAGED = items_of(TASKS)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A standard library of 50 files, one of which a split holds out."""
    root = tmp_path_factory.mktemp("library")
    for number in range(50):
        (root / f"module{number:02}.py").write_text(python_source(number))
    return root


@pytest.fixture(scope="module")
def tasks():
    """The tasks of two held-out files."""
    return generate({"one.py": python_source(1), "two.py": python_source(2)}, [python_source(3)], count=40)


def every(tasks):
    return pytest.mark.parametrize("name", list(tasks))


@every(KINDS)
def test_items_are_whole_and_fit(name):
    items, kind = PACKAGED[name], KINDS[name]
    assert 200 <= len(items) <= 400 == SOURCE["items"]["cloze"]
    assert len(items) == SOURCE["items"][name]
    for item in items:
        assert list(item) == ["context", "choices", "answer", "file", "line"]
        assert len(set(item["choices"])) == len(item["choices"]) == kind.answers
        assert 100 <= len(item["context"].encode()) <= 400
        assert all(choice.isascii() and 0 < len(choice) <= 101 for choice in item["choices"])
        # the harness moves white space from the end of a context to the answers
        assert item["context"] == item["context"].rstrip()
    assert len({(item["context"], *item["choices"]) for item in items}) == len(items)
    assert max(Counter(item["file"] for item in items).values()) < 400 // 2 + kind.answers


@every(KINDS)
def test_what_is_made_is_as_balanced_as_what_is_shipped(name, tasks):
    kind = KINDS[name]
    assert 16 <= len(tasks[name]) <= 40
    for items in (PACKAGED[name], tasks[name]):
        positions = Counter(item["answer"] for item in items)
        assert positions == dict.fromkeys(range(kind.answers), len(items) // kind.answers)
        # any first part of it too, which is what a limit takes
        head = Counter(item["answer"] for item in items[: 5 * kind.answers])
        assert set(head.values()) == {5}


def pieces(text):
    """As a byte-level tokenizer cuts it before it merges anything."""
    return sorted(re.findall(r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", text))


@every(KINDS)
def test_the_answers_alone_say_nothing(name, tasks):
    for items in (PACKAGED[name], tasks[name]):
        if name in ORDER:
            assert all(pieces(one) == pieces(two) for one, two in (item["choices"] for item in items))
            continue
        right = defaultdict(Counter)
        for item in items:
            right[tuple(item["choices"])][item["answer"]] += 1
        for choices, often in right.items():
            assert set(often) == set(range(len(choices)))
            assert len(set(often.values())) == 1


def test_an_item_stands_in_its_file(tasks):
    sources = {"one.py": python_source(1), "two.py": python_source(2)}
    for name, items in tasks.items():
        for item in items:
            text = sources[item["file"]]
            right = item["choices"][item["answer"]]
            assert item["context"] + right in text, name
            assert right.strip() in text.split("\n")[item["line"] - 1]


def test_the_wrong_answer_is_wrong(tasks):
    for item in tasks["names"] + PACKAGED["names"]:
        right, wrong = item["choices"][item["answer"]].strip(), item["choices"][1 - item["answer"]].strip()
        assert re.search(rf"\b{right}\b", item["context"])
        assert not re.search(rf"\b{wrong}\b", item["context"])
        assert len(right) == len(wrong)
    for item in PACKAGED["indentation"]:
        deeper = max(item["choices"], key=len) == item["choices"][item["answer"]]
        assert deeper == item["context"].endswith(":")
    for item in PACKAGED["brackets"]:
        right, wrong = (item["choices"][index][0] for index in (item["answer"], 1 - item["answer"]))
        assert {right, wrong} < set(")]}")


def test_the_same_sources_give_the_same_items_in_any_order(tasks):
    held_out = {"two.py": python_source(2), "one.py": python_source(1)}
    assert generate(held_out, [python_source(3)], count=40) == tasks


def test_what_a_training_document_has_too_is_not_asked(tasks):
    held_out = {"one.py": python_source(1), "two.py": python_source(2)}
    again = generate(held_out, [python_source(1)], count=40)
    for name, items in again.items():
        assert {item["file"] for item in items} == {"two.py"}, name
        assert {item["file"] for item in tasks[name]} == {"one.py", "two.py"}


def test_sources_that_are_no_python_are_read_over():
    text = python_source(1)
    broken = text + '\nprint "(\n\u00e9'
    assert Document("broken.py", broken).tokens == []
    assert generate({"broken.py": broken, "one.py": text}, [], count=8)["brackets"]
    assert generate({"empty.py": ""}, [], count=8) == {name: [] for name in KINDS}


def test_the_shipped_items_come_from_the_held_out_files_of_the_python_they_name(tmp_path, capfd):
    assert main([str(tmp_path)]) == 0
    assert "hf_lowrank_brackets" in capfd.readouterr().out
    made = json.loads((tmp_path / "source.json").read_text())
    _, validation, _ = load_documents(DataArguments())
    digests = {hashlib.sha256(text.encode()).hexdigest() for text in validation["text"]}
    assert set(made["files"].values()) == digests
    for items in items_of(tmp_path).values():
        assert {item["file"] for item in items} <= set(made["files"])
    same = made["corpus_hash"] == SOURCE["corpus_hash"]
    assert same == (made["version"] == SOURCE["version"])
    for file in tmp_path.iterdir():
        if same or file.suffix == ".py":
            assert file.read_bytes() == (TASKS / file.name).read_bytes(), file.name
    extra = {path.name for path in TASKS.iterdir() if path.is_file()} - {path.name for path in tmp_path.iterdir()}
    assert extra == {"README.md", "LICENSE.PSF"}


def test_a_run_gets_the_items_it_has_not_seen(library, tmp_path, monkeypatch):
    shipped = {"source": "embedded", "revision_or_hash": SOURCE["corpus_hash"], "split_seed": 0, "config": "3.11.7"}
    assert task_folder() == task_folder({"source": "hub", "revision_or_hash": None}) == TASKS
    assert task_folder(shipped) == TASKS

    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(library)})
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    with pytest.raises(DataError, match=r"Python 3\.11\.7 \(hash .{8}\).* evaluate it with that Python") as error:
        task_folder({**shipped, "split_seed": 1})
    assert "\n" not in str(error.value)

    *_, source = load_documents(DataArguments())
    own = {"source": "embedded", "revision_or_hash": source["revision_or_hash"], "split_seed": 0, "config": "x"}
    folder = task_folder(own)
    assert folder.is_relative_to(tmp_path)
    assert json.loads((folder / "source.json").read_text())["items"]["names"] >= 100
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert task_folder(own) == folder
    assert before == {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    (folder / "source.json").write_text("{")  # as good as not there
    task_folder(own)
    assert json.loads((folder / "source.json").read_text())["split_seed"] == 0
    other = task_folder({**own, "split_seed": 1})
    assert other != folder
    assert (
        json.loads((other / "source.json").read_text())["files"]
        != json.loads((folder / "source.json").read_text())["files"]
    )


def test_too_few_items_are_refused(tmp_path, monkeypatch, capfd):
    for number in range(3):
        (tmp_path / f"module{number}.py").write_text(python_source(number, functions=2))
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    assert main([str(tmp_path / "tasks")]) == 2
    assert "take another split_seed" in capfd.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "tasks").exists()


def drawn(text):
    """A number that only `text` decides."""
    return float(int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]))


class Scorer(LM):
    """A model whose log-likelihoods are what `score(context, answer)` says."""

    def __init__(self, score):
        super().__init__()
        self.score = score

    def loglikelihood(self, requests):
        return [(self.score(*request.args), False) for request in requests]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError

    def generate_until(self, requests):
        raise NotImplementedError


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    """Evaluates a scorer on the whole group, started in another folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        manager = TaskManager(include_path=str(TASKS), include_defaults=False)

        def evaluate(score):
            return simple_evaluate(Scorer(score), tasks=[GROUP], task_manager=manager, log_samples=False)

        yield evaluate


def test_the_harness_scores_an_oracle_with_one(harness):
    right = {(item["context"], item["choices"][item["answer"]]) for items in PACKAGED.values() for item in items}
    results = harness(lambda context, answer: float((context, answer) in right))
    assert set(results["results"]) == {GROUP, *(f"hf_lowrank_{name}" for name in KINDS)}
    for task, result in results["results"].items():
        assert result["acc,none"] == 1
        assert results["versions"][task] == SOURCE["version"]
    for name, items in PACKAGED.items():
        task = f"hf_lowrank_{name}"
        assert results["n-samples"][task]["original"] == len(items)
        assert results["n-shot"][task] == 0
        assert results["configs"][task]["metadata"]["chance"] == 1 / KINDS[name].answers


@pytest.mark.parametrize(
    "score",
    [
        pytest.param(lambda context, answer: 0.0, id="constant"),
        pytest.param(lambda context, answer: -len(answer), id="length"),
        pytest.param(lambda context, answer: drawn(answer), id="drawn from the answer"),
        pytest.param(lambda context, answer: drawn(context), id="drawn from the context"),
    ],
)
def test_what_does_not_read_both_is_at_chance(score, harness):
    results = harness(score)["results"]
    chance = 0
    for name, items in PACKAGED.items():
        # an order of words that only its hash decides is a throw of coins
        tolerance = 3 * 0.5 / len(items) ** 0.5 if name in ORDER else 1e-9
        assert results[f"hf_lowrank_{name}"]["acc,none"] == pytest.approx(1 / KINDS[name].answers, abs=tolerance)
        chance += len(items) / KINDS[name].answers
    total = sum(map(len, PACKAGED.values()))
    group = yaml.safe_load((TASKS / f"{GROUP}.yaml").read_text())
    assert group["metadata"]["chance"] == pytest.approx(chance / total, abs=1e-4)
    assert results[GROUP]["acc,none"] == pytest.approx(chance / total, abs=0.03)


def test_the_readme_lists_the_tasks_as_they_are():
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| 1/(\d) \|", (TASKS / "README.md").read_text(), re.MULTILINE)
    assert rows == [(name, str(SOURCE["items"][name]), str(kind.answers)) for name, kind in KINDS.items()]


def test_no_file_names_a_place_on_this_machine():
    for file in TASKS.iterdir():
        if file.is_file():
            assert str(Path.home()) not in (text := file.read_text(encoding="utf-8")), file.name
            assert str(TASKS) not in text
