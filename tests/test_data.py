"""Every source gives the rows that its texts dictate, the same ones each time; every mistake is named."""

import bz2
import dataclasses
import gzip
import hashlib
import json
import lzma
import os
import platform
import random
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import datasets
import pytest
import torch
from datasets.distributed import split_dataset_by_node
from huggingface_hub import HfApi
from transformers import (
    AutoTokenizer,
    ByT5Tokenizer,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from hf_lowrank.data import DataArguments, DataError, load_data, tokenizer_hash

WORDS = [
    "low",
    "rank",
    "gradient",
    "matrix",
    "subspace",
    "spectrum",
    "loss",
    "curve",
    "update",
    "memory",
    "weight",
    "layer",
    "norm",
    "step",
]


def document(seed):
    """About 120 distinct words of text, with its seed in it, so that no two are the same."""
    generator = random.Random(seed)
    return f"document-{seed}: " + " ".join(generator.choice(WORDS) for _ in range(120)) + "."


DOCUMENTS = [document(seed) for seed in range(60)]


def write_jsonl(path, documents, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text, **more}) + "\n" for text in documents))
    return path


def write_file(path, texts):
    """Texts in a file of what its suffixes say."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = path.name.split(".")[1:]
    plain = path.with_name(f"plain.{kinds[0]}")
    if kinds[0] == "parquet":
        datasets.Dataset.from_dict({"text": texts, "n": [0] * len(texts)}).to_parquet(str(plain))
    elif kinds[0] in ("csv", "tsv"):
        lines = [["n", "text"], *[["1", text] for text in texts]]
        plain.write_text("".join({"csv": ",", "tsv": "\t"}[kinds[0]].join(line) + "\n" for line in lines))
    elif kinds[0] in ("jsonl", "ndjson"):
        write_jsonl(plain, texts)
    elif kinds[0] == "json":
        plain.write_text(json.dumps([{"text": text} for text in texts]))
    else:
        plain.write_text("\n\n".join(texts))
    content = plain.read_bytes()
    plain.unlink()
    path.write_bytes({"gz": gzip, "bz2": bz2, "xz": lzma}[kinds[1]].compress(content) if kinds[1:] else content)


def only(corpus):
    return {"tokenizer_name": corpus["tokenizer_name"]}


def load(**arguments):
    return load_data(
        DataArguments(**{"vocab_size": 512, "sequence_length": 32, "validation_fraction": 0.1, **arguments})
    )


def decoded(data, rows):
    return "".join(data.tokenizer.decode(row["input_ids"]) for row in rows)


def fingerprint(rows):
    return hashlib.sha256(json.dumps([row["input_ids"] for row in rows]).encode()).hexdigest()


def seeds_in(text):
    return {int(seed) for seed in re.findall(r"document-(\d+):", text)}


@pytest.fixture(scope="module", autouse=True)
def _no_progress_bars():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A JSONL file of DOCUMENTS and a saved tokenizer, which most tests share."""
    folder = tmp_path_factory.mktemp("corpus")
    path = write_jsonl(folder / "corpus.jsonl", DOCUMENTS, url="here")
    load(dataset_path=str(path)).tokenizer.save_pretrained(folder / "tokenizer")
    return {"dataset_path": str(path), "tokenizer_name": str(folder / "tokenizer")}


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory):
    """A folder laid out like C4 on the Hub: two shards of training documents and a validation file."""
    folder = tmp_path_factory.mktemp("hub") / "tiny-c4"
    write_jsonl(folder / "en" / "train-00000.jsonl", DOCUMENTS[:25])
    write_jsonl(folder / "en" / "train-00001.jsonl", DOCUMENTS[25:50])
    write_jsonl(folder / "en" / "validation-00000.jsonl", DOCUMENTS[50:])
    write_jsonl(folder / "bare" / "train-00000.jsonl", [f"document-{seed}: low rank" for seed in range(700)])
    write_jsonl(folder / "bare" / "train-00001.jsonl", [f"document-{seed}: low rank" for seed in range(700, 1400)])
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files:\n  - split: train\n    path: en/train-*.jsonl\n"
        "  - split: validation\n    path: en/validation-*.jsonl\n"
        "- config_name: bare\n  data_files:\n  - split: train\n    path: bare/train-*.jsonl\n---\n"
    )
    return str(folder)


# What comes in


def test_arguments_parse_beside_the_trainers():
    names = {f.name for f in dataclasses.fields(DataArguments)}
    assert not names & {f.name for f in dataclasses.fields(TrainingArguments)}
    assert all(f.metadata["help"] for f in dataclasses.fields(DataArguments))
    (parsed,) = HfArgumentParser(DataArguments).parse_args_into_dataclasses(
        ["--dataset_name", "allenai/c4", "--packing", "false", "--max_eval_sequences", "7"]
    )
    assert (parsed.dataset_name, parsed.packing, parsed.max_eval_sequences) == ("allenai/c4", False, 7)


@pytest.mark.parametrize("part", ["asyncio", pytest.param("", marks=pytest.mark.slow)])
def test_the_embedded_default_is_what_every_python_carries(part, monkeypatch):
    root = Path(sysconfig.get_paths()["stdlib"])
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(root / part)})
    data = load_data(DataArguments())
    description = data.description
    assert json.loads(json.dumps(description)) == description
    assert (description["name"], description["config"]) == ("python-stdlib", platform.python_version())
    assert description["source"] == "embedded"
    assert (description["sequence_length"], description["packing"], description["split_seed"]) == (256, True, 0)
    assert description["train_sequences"] == len(data.train) > (200 if part else 10_000)
    assert description["validation_sequences"] == len(data.validation) > (2 if part else 200)
    assert description["validation_tokens"] == 256 * len(data.validation)
    assert description["tokenizer_hash"] == tokenizer_hash(data.tokenizer)
    assert len(data.tokenizer) == 4096
    text = decoded(data, data.train)
    assert (root / "asyncio" / "queues.py").read_text() in text
    assert "class" in decoded(data, data.validation)
    assert len(data.tokenizer(text)["input_ids"]) < len(text) / 3


def test_the_embedded_default_leaves_out_tests_packages_and_generated_files(tmp_path, monkeypatch, corpus):
    kept = [f"module{seed}.py" for seed in range(8)] + ["asyncio/queues.py"]
    left_out = ["test/test_a.py", "unittest/tests/b.py", "idlelib/idle_test/c.py", "lib2to3/tests/d.py"]
    left_out += ["site-packages/e.py", "dist-packages/f.py", "json/__pycache__/g.py", "_sysconfigdata_x.py"]
    left_out += ["config-3-x86/h.py", "notes.txt"]
    for seed, name in enumerate(kept + left_out):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(document(seed))
    (tmp_path / "latin.py").write_bytes("# caf\xe9 document-77: ".encode("latin-1"))
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    data = load(tokenizer_name=corpus["tokenizer_name"])
    in_train, in_validation = seeds_in(decoded(data, data.train)), seeds_in(decoded(data, data.validation))
    assert in_train | in_validation == set(range(len(kept)))
    assert len(in_validation) == 1


def test_a_text_file_is_cut_at_blank_lines_into_long_pieces(tmp_path, corpus):
    path = tmp_path / "book.txt"
    paragraphs = [document(seed) + "\n" + document(1000 + seed) for seed in range(200)]
    path.write_text("\n\n".join(paragraphs))
    data = load(dataset_path=str(path), tokenizer_name=corpus["tokenizer_name"], validation_fraction=0.04)
    pieces = (decoded(data, data.train) + decoded(data, data.validation)).split("<|endoftext|>")
    whole = [piece for piece in pieces if piece.startswith("document-") and piece.endswith("\n\n")]
    assert whole
    assert all(8192 <= len(piece) < 8192 + 2 * len(paragraphs[0]) for piece in whole)
    assert not seeds_in(decoded(data, data.train)) & seeds_in(decoded(data, data.validation))


def test_a_text_file_without_blank_lines_is_cut_at_line_ends(tmp_path, corpus):
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(DOCUMENTS))
    data = load(dataset_path=str(path), tokenizer_name=corpus["tokenizer_name"])
    in_train, in_validation = seeds_in(decoded(data, data.train)), seeds_in(decoded(data, data.validation))
    assert len(in_validation) >= 2
    assert not in_train & in_validation


@pytest.mark.parametrize("kind", ["json", "jsonl.gz", "parquet", "saved", "saved_dict", "folder"])
def test_every_kind_of_path_gives_the_same_rows(kind, tmp_path, corpus):
    expected = load(**corpus)
    path = tmp_path / f"corpus.{kind}"
    table = datasets.Dataset.from_dict({"text": DOCUMENTS})
    if kind == "json":
        path.write_text(json.dumps([{"text": text} for text in DOCUMENTS]))
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(Path(corpus["dataset_path"]).read_bytes()))
    elif kind == "parquet":
        table.to_parquet(str(path))
    elif kind == "saved":
        table.save_to_disk(str(path))
    elif kind == "saved_dict":
        datasets.DatasetDict({"train": table}).save_to_disk(str(path))
    else:
        for seed, text in enumerate(DOCUMENTS):
            (path / f"part{seed // 20}").mkdir(parents=True, exist_ok=True)
            (path / f"part{seed // 20}" / f"{seed:03}.txt").write_text(text)
    data = load(**{**corpus, "dataset_path": str(path)})
    assert fingerprint(data.train) == fingerprint(expected.train)
    assert fingerprint(data.validation) == fingerprint(expected.validation)
    assert data.description["name"] == path.name
    assert data.description["source"] == "local"


FOLDERS = [
    ["a.jsonl"], ["a.parquet"], ["a.json.gz"], ["a.csv"], ["a.tsv.gz"], ["a.ndjson.bz2"], ["a.txt.gz", "b.txt"],
    ["a.md.xz", "b.md.xz"], ["a.jsonl", "b.parquet", "c/d.jsonl.gz", "e.txt"],
]  # fmt: skip


@pytest.mark.parametrize("names", FOLDERS)
def test_a_folders_files_are_read_by_what_they_are(names, tmp_path, corpus):
    shares = [DOCUMENTS[i :: len(names)] for i in range(len(names))]
    for name, texts in zip(names, shares, strict=True):
        write_file(tmp_path / name, texts)
    pattern = "*" if len(names) > 2 else f"*.{names[0].split('.')[1]}*"
    data = load(dataset_path=str(tmp_path), dataset_glob=pattern, **only(corpus))
    in_train, in_validation = seeds_in(decoded(data, data.train)), seeds_in(decoded(data, data.validation))
    assert in_train | in_validation == set(range(60))
    assert not in_train & in_validation
    # the text alone, and none of what is around it in the file
    assert not re.search(r'[{"\t,]|\bn\b', decoded(data, data.train))


@pytest.mark.parametrize("name", ["a.txt.gz", "a.csv", "a.tsv", "a.ndjson", "a.parquet", "a.jsonl.xz"])
def test_a_file_is_read_by_what_it_is(name, tmp_path, corpus):
    write_file(tmp_path / name, DOCUMENTS)
    data = load(dataset_path=str(tmp_path / name), **only(corpus))
    assert seeds_in(decoded(data, data.train)) | seeds_in(decoded(data, data.validation)) == set(range(60))


UNDECODABLE = {
    "latin-1": lambda text: (text + " caf\xe9").encode("latin-1"),
    "utf-16": lambda text: text.encode("utf-16"),
    "utf-16 without BOM": lambda text: text.encode("utf-16-le"),
    "utf-32 without BOM": lambda text: text.encode("utf-32-be"),
    "a binary file": lambda text: text.encode() + bytes(8),
}


@pytest.mark.parametrize("kind", UNDECODABLE)
def test_files_that_are_no_utf8_text_are_counted_and_named(kind, tmp_path, corpus, caplog):
    for seed, text in enumerate(DOCUMENTS[:20]):
        (tmp_path / f"{seed:02}.txt").write_bytes((UNDECODABLE[kind] if seed % 4 else str.encode)(text))
    where = {"dataset_path": str(tmp_path), **only(corpus)}
    said = r"15 of 20 files are not UTF-8 text \(01.txt, 02.txt, 03.txt, ...\)"
    with pytest.raises(DataError, match=said + ": convert them, or set skip_undecodable"):
        load(**where)
    data = load(**where, skip_undecodable=True)
    assert seeds_in(decoded(data, data.train)) | seeds_in(decoded(data, data.validation)) == {0, 4, 8, 12, 16}
    assert re.search(said + " and are left out", caplog.text)
    with pytest.raises(DataError, match="02.txt' is not UTF-8 text"):
        load(**{**where, "dataset_path": str(tmp_path / "02.txt")})


@pytest.mark.parametrize("kind", ["file", "folder", "jsonl", "csv"])
def test_a_byte_order_mark_is_no_text(kind, tmp_path, corpus):
    name = f"a.{kind}" if kind in ("jsonl", "csv") else "a.txt"
    for seed in range(0, 60, 20):
        write_file(tmp_path / f"{seed}{name}", DOCUMENTS[seed : seed + 20])
        content = (tmp_path / f"{seed}{name}").read_bytes()
        (tmp_path / f"{seed}{name}").write_bytes(b"\xef\xbb\xbf" + content)
    where = tmp_path if kind == "folder" else tmp_path / f"20{name}"
    data = load(dataset_path=str(where), **only(corpus))
    text = decoded(data, data.train) + decoded(data, data.validation)
    assert len(seeds_in(text)) == (60 if kind == "folder" else 20)
    assert "\ufeff" not in text


@pytest.mark.parametrize(
    "values", [[None, 3], [None, "low", 3], ["low", 3], ["low", ["rank"]], [None, 2.5, None], [True]]
)
@pytest.mark.parametrize("how", ["file", "folder", "streamed", "downloaded"])
def test_a_column_of_other_things_than_text_is_named(values, how, tmp_path, corpus):
    folder = tmp_path / "data"
    folder.mkdir()
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps({"text": value}) + "\n" for value in values * 3))
    where = {
        "dataset_path": str(path if how == "file" else folder),
        "dataset_glob": None if how == "file" else "*.jsonl",
    }
    if how in ("streamed", "downloaded"):
        where = {"dataset_name": str(folder), "streaming": how == "streamed"}
    with pytest.raises(DataError, match="column 'text' of data set '.*' holds no text|cannot be read"):
        load(**where, **only(corpus))


@pytest.mark.parametrize("splits", [("test",), ("validation", "test")])
@pytest.mark.parametrize("how", ["saved", "streamed", "downloaded"])
def test_every_source_is_validated_on_the_same_split(how, splits, tmp_path, corpus):
    parts = {
        "train": DOCUMENTS[:30],
        **{split: DOCUMENTS[30 + 10 * i : 40 + 10 * i] for i, split in enumerate(splits)},
    }
    folder = tmp_path / "data"
    if how == "saved":
        saved = {name: datasets.Dataset.from_dict({"text": texts}) for name, texts in parts.items()}
        datasets.DatasetDict(saved).save_to_disk(str(folder))
        data = load(dataset_path=str(folder), **only(corpus))
    else:
        for name, texts in parts.items():
            write_jsonl(folder / f"{name}.jsonl", texts)
        data = load(dataset_name=str(folder), streaming=how == "streamed", **only(corpus))
    assert seeds_in(decoded(data, data.train)) == set(range(30))
    assert seeds_in(decoded(data, data.validation)) == set(range(30, 40))


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_saved_split_is_the_validation(split, tmp_path, corpus):
    parts = {"train": DOCUMENTS[:30], split: DOCUMENTS[30:40]}
    saved = {name: datasets.Dataset.from_dict({"text": texts}) for name, texts in parts.items()}
    datasets.DatasetDict(saved).save_to_disk(str(tmp_path / "saved"))
    before = sorted(path.name for path in (tmp_path / "saved").rglob("*"))
    data = load(dataset_path=str(tmp_path / "saved"), tokenizer_name=corpus["tokenizer_name"])
    assert seeds_in(decoded(data, data.train)) == set(range(30))
    assert seeds_in(decoded(data, data.validation)) == set(range(30, 40))
    # Nothing is written into a folder that is the user's, and may be read-only.
    assert sorted(path.name for path in (tmp_path / "saved").rglob("*")) == before


def test_the_glob_takes_files_at_any_depth(tmp_path, corpus):
    for seed, name in enumerate(["a.py", "deep/b.py", "deep/er/c.py", "d.txt"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(document(seed))
    data = load(dataset_path=str(tmp_path), dataset_glob="*.py", tokenizer_name=corpus["tokenizer_name"])
    assert seeds_in(decoded(data, data.train)) | seeds_in(decoded(data, data.validation)) == {0, 1, 2}


def test_another_text_column(tmp_path, corpus):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": 1, "content": text}) + "\n" for text in DOCUMENTS))
    data = load(**{**corpus, "dataset_path": str(path)}, text_column="content")
    assert fingerprint(data.train) == fingerprint(load(**corpus).train)


# What comes out


def test_packing_is_the_concatenation_of_the_documents(corpus):
    data = load(**corpus)
    order = [int(part.split(":")[0]) for part in decoded(data, data.train).split("document-")[1:] if ":" in part]
    expected = []
    for seed in order:
        expected += data.tokenizer(DOCUMENTS[seed])["input_ids"] + [data.tokenizer.eos_token_id]
    blocks = [row["input_ids"] for row in data.train]
    packed = [token for block in blocks for token in block]
    assert {len(block) for block in blocks} == {32}
    assert packed == expected[: len(packed)]
    assert 0 <= len(expected) - len(packed) < 32 + len(data.tokenizer(DOCUMENTS[0])["input_ids"])
    assert all(row["labels"] == row["input_ids"] for row in data.train)
    assert data.train.column_names == data.validation.column_names == ["input_ids", "labels"]


def test_rows_may_span_more_documents_than_one_batch(tmp_path, corpus):
    # `datasets` maps a thousand documents at a time; no token may be lost where one batch meets the next.
    texts = [f"document-{seed}:" for seed in range(2500)]
    path = write_jsonl(tmp_path / "many.jsonl", texts)
    data = load(**{**corpus, "dataset_path": str(path)})
    tokens = sum(len(ids) + 1 for ids in data.tokenizer(texts)["input_ids"])
    rows = len(data.train) + len(data.validation)
    assert 0 <= tokens - 32 * rows < 2 * 32


def test_without_packing_a_row_is_a_document_and_padding_is_no_label(tmp_path, corpus):
    texts = ["low rank", *DOCUMENTS[:20]]
    path = write_jsonl(tmp_path / "corpus.jsonl", texts)
    data = load(**{**corpus, "dataset_path": str(path)}, packing=False)
    rows = [*data.train, *data.validation]
    assert len(rows) == len(texts)
    assert data.description["validation_tokens"] == sum(sum(row["attention_mask"]) for row in data.validation)
    lengths = []
    for row in rows:
        lengths.append(sum(row["attention_mask"]))
        ids = row["input_ids"][: lengths[-1]]
        assert any(data.tokenizer(text)["input_ids"][:32] == ids for text in texts)
        assert row["attention_mask"] == [1] * lengths[-1] + [0] * (32 - lengths[-1])
        assert row["labels"] == ids + [-100] * (32 - lengths[-1])
    assert min(lengths) < 32 == max(lengths)


def test_blank_documents_do_not_count(tmp_path, corpus):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["", None, " \n", *DOCUMENTS]))
    assert fingerprint(load(**{**corpus, "dataset_path": str(path)}).train) == fingerprint(load(**corpus).train)


def test_no_held_out_file_is_trained_on_not_even_its_copies(tmp_path, corpus):
    for seed, text in enumerate(DOCUMENTS[:30] * 2):
        (tmp_path / f"{seed:02}.txt").write_text(text)
    data = load(dataset_path=str(tmp_path), tokenizer_name=corpus["tokenizer_name"])
    in_train, in_validation = seeds_in(decoded(data, data.train)), seeds_in(decoded(data, data.validation))
    assert in_validation
    assert not in_train & in_validation
    assert in_train | in_validation == set(range(30))


def test_the_seed_chooses_the_split_and_the_cap_spreads_over_it(corpus):
    data, other, capped = load(**corpus), load(**corpus, split_seed=1), load(**corpus, max_eval_sequences=3)
    assert seeds_in(decoded(data, data.validation)) != seeds_in(decoded(other, other.validation))
    last = len(data.validation) - 1
    spread = [data.validation[i]["input_ids"] for i in (0, round(last / 2), last)]
    assert [row["input_ids"] for row in capped.validation] == spread
    assert capped.description["validation_tokens"] == 3 * 32
    assert fingerprint(capped.train) == fingerprint(data.train)


@pytest.mark.slow
def test_two_calls_and_two_processes_agree(corpus, tmp_path):
    code = (
        "import json, sys; from hf_lowrank.data import *; "
        "data = load_data(DataArguments("
        "dataset_path=sys.argv[1], vocab_size=512, sequence_length=32, validation_fraction=0.1)); "
        "print(json.dumps([data.description, data.train[:]['input_ids']]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, corpus["dataset_path"]],
        env={**os.environ, "PYTHONHASHSEED": "7", "HF_DATASETS_CACHE": str(tmp_path)},
        cwd=Path(__file__).parents[1],
        check=True,
        capture_output=True,
        text=True,
    )
    first, second = (load(dataset_path=corpus["dataset_path"]) for _ in range(2))
    expected = [first.description, first.train[:]["input_ids"]]
    assert [second.description, second.train[:]["input_ids"]] == expected
    assert json.loads(done.stdout.splitlines()[-1]) == expected


def test_the_content_hash_follows_every_byte(tmp_path, corpus):
    path = write_jsonl(tmp_path / "corpus.jsonl", DOCUMENTS)
    arguments = {**corpus, "dataset_path": str(path)}
    before = load(**arguments)
    path.write_text(path.read_text().replace("document-7:", "document-8:"))
    after = load(**arguments)
    assert before.description["revision_or_hash"] != after.description["revision_or_hash"]
    assert 7 not in seeds_in(decoded(after, [*after.train, *after.validation]))
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_bytes(path.read_bytes())
    again = load(**{**arguments, "dataset_path": str(moved)})
    assert again.description["revision_or_hash"] == after.description["revision_or_hash"]
    folder = write_jsonl(tmp_path / "hub" / "train.jsonl", DOCUMENTS).parent
    where = {"dataset_name": str(folder), "streaming": False, "tokenizer_name": corpus["tokenizer_name"]}
    hashes = [load(**where).description["revision_or_hash"]]
    (folder / "train.jsonl").write_text(path.read_text())
    hashes.append(load(**where).description["revision_or_hash"])
    assert hashes[0] != hashes[1]


# Streams


def test_a_stream_gives_the_rows_of_the_downloaded_data_set(hub_folder, corpus):
    where = {"dataset_name": hub_folder, "dataset_config_name": "en", "tokenizer_name": corpus["tokenizer_name"]}
    streamed, whole = load(**where), load(**where, streaming=False)
    assert isinstance(streamed.train, datasets.IterableDataset)
    assert list(streamed.train) == list(whole.train)
    assert list(streamed.train) == list(whole.train)  # a second epoch
    assert list(streamed.validation) == list(whole.validation)
    assert seeds_in(decoded(whole, whole.validation)) == set(range(50, 60))
    assert streamed.description == {**whole.description, "train_sequences": None}
    assert (whole.description["name"], whole.description["config"]) == ("tiny-c4", "en")
    unpacked = [load(**where, packing=False, streaming=streaming).train for streaming in (True, False)]
    assert list(unpacked[0]) == list(unpacked[1])


def test_a_stream_without_validation_split_holds_out_its_beginning(hub_folder, corpus):
    where = {"dataset_name": hub_folder, "dataset_config_name": "bare", "tokenizer_name": corpus["tokenizer_name"]}
    assert len(load(**where, max_eval_sequences=20).validation) == 20
    data = load(**where)
    held_out = seeds_in(decoded(data, data.validation))
    assert held_out == set(range(max(held_out) + 1))
    assert 990 < max(held_out) < 1000  # less than a row is dropped at the end
    trained_on = seeds_in(decoded(data, data.train))
    assert trained_on == set(range(1000, max(trained_on) + 1))
    assert max(trained_on) > 1390  # less than a row is dropped at the end
    # Workers and processes each read one of the two files; the held-out documents lie across both.
    loader = torch.utils.data.DataLoader(data.train, batch_size=None, num_workers=2)
    in_rows = [seeds_in(decoded(data, [row])) for row in loader]
    assert len(in_rows) > 100
    assert min(set().union(*in_rows)) >= 1000
    shares = [seeds_in(decoded(data, split_dataset_by_node(data.train, rank, 2))) for rank in range(2)]
    assert shares[0] | shares[1] == trained_on
    assert not shares[0] & shares[1]


def test_a_stream_resumes_where_it_was(hub_folder, corpus):
    where = {"dataset_name": hub_folder, "dataset_config_name": "en", "tokenizer_name": corpus["tokenizer_name"]}
    stream = load(**where).train
    rows = iter(stream)
    for _ in range(5):
        next(rows)
    state = json.loads(json.dumps(stream.state_dict()))
    expected = list(rows)
    resumed = load(**where).train
    resumed.load_state_dict(state)
    assert list(resumed) == expected
    assert len(expected) > 10


def test_the_trainer_trains_on_a_stream(hub_folder, corpus, tmp_path):
    data = load(dataset_name=hub_folder, dataset_config_name="en", tokenizer_name=corpus["tokenizer_name"])
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=1,
        vocab_size=len(data.tokenizer),
    )
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, logging_steps=1, use_cpu=True, report_to=[]
    )
    trainer = Trainer(
        LlamaForCausalLM(config),
        arguments,
        data_collator=default_data_collator,
        train_dataset=data.train,
        eval_dataset=data.validation,
    )
    (batch, *_) = trainer.get_train_dataloader()
    assert batch["input_ids"].tolist() == [row["input_ids"] for row in data.train.take(4)]
    assert batch["labels"].dtype == torch.int64
    assert trainer.train().global_step == 2
    assert 4 < trainer.evaluate()["eval_loss"] < 8  # ln 512 = 6.24


def test_a_hub_data_set_is_known_by_its_commit_online_and_offline(hub_folder, corpus, hub, go_offline):
    api = HfApi()
    api.create_repo("user/tiny-c4", repo_type="dataset")
    commit = api.upload_folder(repo_id="user/tiny-c4", folder_path=hub_folder, repo_type="dataset").oid
    local = load(dataset_name=hub_folder, dataset_config_name="en", tokenizer_name=corpus["tokenizer_name"])
    where = {"dataset_name": "user/tiny-c4", "dataset_config_name": "en", "tokenizer_name": corpus["tokenizer_name"]}
    for streaming in (True, False, "offline"):
        if streaming == "offline":
            go_offline()
        data = load(**where, streaming=streaming is True)
        assert (data.description["name"], data.description["revision_or_hash"]) == ("user/tiny-c4", commit)
        assert list(data.train) == list(local.train)
        assert list(data.validation) == list(local.validation)


# Tokenizers


def test_the_tokenizer_is_trained_on_the_training_share_alone(tmp_path):
    held_out = "zyzzyva " * 40
    saved = {"train": DOCUMENTS, "validation": [held_out] * 30}
    saved = {name: datasets.Dataset.from_dict({"text": texts}) for name, texts in saved.items()}
    datasets.DatasetDict(saved).save_to_disk(str(tmp_path / "saved"))
    tokenizer = load(dataset_path=str(tmp_path / "saved")).tokenizer
    assert len(tokenizer.tokenize(" gradient")) == 1
    assert len(tokenizer.tokenize(" zyzzyva")) > 3
    assert tokenizer.eos_token == tokenizer.bos_token == tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.decode(tokenizer("caf\u00e9  \t\n\u4e2d").input_ids) == "caf\u00e9  \t\n\u4e2d"
    assert set(tokenizer("low")) == {"input_ids", "attention_mask"}


def test_the_tokenizer_hash_survives_saving_and_use(tmp_path, corpus):
    tokenizer = load(**corpus).tokenizer
    expected = tokenizer_hash(tokenizer)
    tokenizer(["low", "rank low rank"], truncation=True, padding="max_length", max_length=7)
    assert tokenizer_hash(tokenizer) == expected
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_hash(AutoTokenizer.from_pretrained(tmp_path)) == expected
    tokenizer.add_tokens(["<|new|>"])
    assert tokenizer_hash(tokenizer) != expected


def test_a_tokenizer_written_in_python_works(tmp_path, corpus):
    ByT5Tokenizer().save_pretrained(tmp_path / "bytes")
    data = load(dataset_path=corpus["dataset_path"], tokenizer_name=str(tmp_path / "bytes"))
    assert not data.tokenizer.is_fast
    assert data.description["tokenizer_name"] == "bytes"
    assert data.description["tokenizer_hash"] == tokenizer_hash(ByT5Tokenizer())
    assert data.tokenizer.decode(data.train[0]["input_ids"]).startswith("document-")


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset_name": "a/b", "dataset_path": "c.txt"}, "'a/b' and dataset_path 'c.txt' exclude each other"),
        ({"dataset_config_name": "en"}, "dataset_config_name 'en' needs dataset_name"),
        ({"dataset_glob": "*.py"}, r"dataset_glob '\*.py' needs the folder"),
        ({"validation_fraction": 0.0}, r"validation_fraction 0.0 is outside \(0, 0.5\]"),
        ({"validation_fraction": 0.6}, r"validation_fraction 0.6 is outside \(0, 0.5\]"),
        ({"sequence_length": 1}, "sequence_length 1 is too small: take 2"),
        ({"vocab_size": 300}, "vocab_size 300 is too small: take 512"),
        ({"max_eval_sequences": 0}, "max_eval_sequences 0 is too small: take 1"),
        ({"split_seed": -1}, "split_seed -1 is too small: take 0"),
    ],
)
def test_impossible_arguments(arguments, message):
    with pytest.raises(DataError, match=message):
        DataArguments(**arguments)


def text_lines(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


@pytest.mark.parametrize(
    ("name", "content", "more", "message"),
    [
        ("absent.txt", None, {}, "absent.txt' does not exist"),
        ("data.tex", "x", {}, r"unknown file type '.tex': give .json.*dataset_glob '\*.tex'"),
        ("empty.txt", "", {}, "'empty.txt' is empty"),
        ("empty.jsonl", "", {}, "empty.jsonl' is empty"),
        ("blank.jsonl", text_lines("", "  "), {}, "all its documents are blank"),
        ("latin.txt", b"caf\xe9", {}, "latin.txt' is not UTF-8 text"),
        ("one.jsonl", text_lines("alone"), {}, "one document and none is left for validation"),
        ("same.jsonl", text_lines(*["same"] * 9), {}, "no training documents left, all are held out or copies"),
        ("short.jsonl", text_lines("low", "rank"), {}, r"training share has \d tokens, sequence_length is 32"),
        ("number.jsonl", '{"text": 1}\n', {}, "column 'text' of data set 'number.jsonl' holds no text"),
        ("other.jsonl", text_lines("low"), {"text_column": "body"}, r"no column 'body' but \['text'\]"),
        ("broken.jsonl", text_lines("low") + '{"text": "ra', {}, "broken.jsonl' cannot be read as json"),
        ("broken.parquet", "PAR1 no", {}, "broken.parquet' cannot be read as parquet"),
        ("saved/state.json", "{}", {}, "saved' is not a whole saved Dataset or DatasetDict"),
        ("saved/dataset_dict.json", "{", {}, "saved' is not a whole saved Dataset or DatasetDict"),
        ("folder/a.md", "low", {}, r"no file that matches dataset_glob '\*.txt'"),
        ("folder/a.md", "low", {"dataset_glob": "/x"}, "dataset_glob '/x' is no pattern"),
        ("a.txt", "low\nrank\n", {"dataset_glob": "*.txt"}, "a.txt' is a file: drop it"),
        ("a.txt", "low\nrank\n", {"tokenizer_name": "./absent"}, "tokenizer_name './absent' cannot be loaded"),
    ],
)
def test_unusable_paths(name, content, more, message, tmp_path, corpus):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    where = path.parent if "/" in name else path
    with pytest.raises(DataError, match=message) as caught:
        load(**{**corpus, "dataset_path": str(where), **more})
    assert "\n" not in str(caught.value)
    assert ": " in str(caught.value)


def test_a_validation_share_shorter_than_a_row(corpus):
    with pytest.raises(DataError, match=r"validation share has \d+ tokens, sequence_length is 4000"):
        load(**{**corpus, "sequence_length": 4000, "validation_fraction": 0.02})


def test_a_saved_dictionary_without_training_split(tmp_path, corpus):
    part = datasets.Dataset.from_dict({"text": DOCUMENTS})
    datasets.DatasetDict({"first": part}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match=r"no split 'train' but \['first'\]"):
        load(**{**corpus, "dataset_path": str(tmp_path / "saved")})


def test_unusable_hub_data_sets(hub_folder, corpus, hub, go_offline):
    tokenizer = {"tokenizer_name": corpus["tokenizer_name"]}
    with pytest.raises(DataError, match=r"tiny-c4' cannot be loaded .*'de' not found.*check it and the network"):
        load(dataset_name=hub_folder, dataset_config_name="de", **tokenizer)
    with pytest.raises(DataError, match=r"dataset_name 'no-such/data-set' cannot be loaded .*use dataset_path"):
        load(dataset_name="no-such/data-set", **tokenizer)
    go_offline()
    with pytest.raises(DataError, match=r"dataset_name 'user/data-set' cannot be loaded .*use dataset_path"):
        load(dataset_name="user/data-set", **tokenizer)


def test_unusable_streams(corpus, tmp_path):
    where = {"dataset_name": str(tmp_path / "few"), "tokenizer_name": corpus["tokenizer_name"]}
    path = write_jsonl(tmp_path / "few" / "train.jsonl", DOCUMENTS)
    with pytest.raises(DataError, match=r"no training documents left, all are held out.*set streaming to false"):
        load(**where)
    assert len(load(**where, streaming=False).train) > 50
    with pytest.raises(DataError, match=r"data set 'few' has no column 'body' but \['text'\]"):
        load(**where, text_column="body")
    path.write_text('{"text": "lo')
    with pytest.raises(DataError, match="data set 'few' cannot be read"):
        load(**where)


def test_a_tokenizer_without_end_of_text(tmp_path, corpus):
    tokenizer = AutoTokenizer.from_pretrained(corpus["tokenizer_name"])
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(DataError, match="has no end-of-text token: set eos_token"):
        load(dataset_path=corpus["dataset_path"], tokenizer_name=str(tmp_path))


@pytest.mark.parametrize("named", [False, True])
def test_cached_rows_and_tokenizer_are_those_that_were_not_cached(named, tmp_path, corpus, monkeypatch):
    cache, path = tmp_path / "cache", write_jsonl(tmp_path / "text.jsonl", DOCUMENTS)
    arguments = DataArguments(
        dataset_path=str(path), vocab_size=512, sequence_length=32, validation_fraction=0.1,
        **(only(corpus) if named else {}),
    )  # fmt: skip
    plain = load_data(arguments)
    saved = []
    for number, data in enumerate((plain, load_data(arguments, cache), load_data(arguments, cache))):
        assert data.description == plain.description
        assert data.train[:] == plain.train[:]
        assert data.validation[:] == plain.validation[:]
        data.tokenizer.save_pretrained(tmp_path / str(number))
        saved.append({file.name: file.read_bytes() for file in (tmp_path / str(number)).iterdir()})
    assert saved[0] == saved[1] == saved[2]
    (entry,) = cache.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr("hf_lowrank.data._rows", None)
        load_data(arguments, cache)
    # another text under the same name, or another cut, is another entry
    write_jsonl(path, DOCUMENTS[1:])
    load_data(arguments, cache)
    load_data(dataclasses.replace(arguments, sequence_length=16), cache)
    assert len(list(cache.iterdir())) == 3
    (entry / "train" / "state.json").unlink()
    write_jsonl(path, DOCUMENTS)
    with pytest.raises(DataError, match="cached data in .* cannot be read .*remove that folder"):
        load_data(arguments, cache)
