import json
import subprocess
import time
from pathlib import Path

import datasets
import numpy as np
import psutil
import pytest

from data_prep.columns import equal_texts
from data_prep.encode import UnitEncoder, Work
from data_prep.plan import BuildOptions, Plan
from data_prep.sources import parse_sources
from data_prep.store import TokenStore
from data_prep.tokenizer import open_tokenizer
from storage.manifest import PackingPolicy, read_manifest
from storage.shards import open_split
from tests.data_prep.builds import UNIT_BYTES, arguments, build_here, command, contents, run
from tests.data_prep.texts import DEEPSEEK, MISTRAL, PROSE, write_lines

# --- the same bytes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "seed", "encoder"), [(1, "1", "accelerated"), (2, "2", "plain"), (3, "3", "auto")])
def test_workers_encoder_and_hash_seed_do_not_show(
    prose, tokenizer_folder, reference, tmp_path, workers, seed, encoder
):
    words = arguments(prose, tokenizer_folder, tmp_path / "data", "--workers", workers, "--encoder", encoder)
    done = run("build", *words, PYTHONHASHSEED=seed)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "data") == contents(reference)
    assert read_manifest(reference).fingerprint in done.stdout


def test_order_in_which_units_finish_does_not_show(prose, tokenizer_folder, reference, tmp_path):
    options = BuildOptions(packing=PackingPolicy(seq_length=128), unit_bytes=UNIT_BYTES)
    tokenizer = open_tokenizer(tokenizer_folder)
    plan = Plan(parse_sources([str(prose)], []), options, tokenizer)
    output = tmp_path / "data"
    (output / "tokens").mkdir(parents=True)
    encoder = UnitEncoder(
        Work(output / "tokens", tokenizer.path, plan.sha256, plan.files, "text", None, 0, "fail", None), lambda *_: None
    )
    for unit in np.random.default_rng(0).permutation(len(plan.units)):
        encoder.run(plan.units[unit])
    (output / "plan.json").write_bytes((reference / "plan.json").read_bytes())
    build_here([prose], tokenizer_folder, output, unit_bytes=UNIT_BYTES)
    assert contents(output) == contents(reference)


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_any_moment_it_continues(prose, tokenizer_folder, reference, tmp_path, workers):
    output = tmp_path / "data"
    words, settings = command("build", *arguments(prose, tokenizer_folder, output, "--workers", workers))
    generator = np.random.default_rng(workers)
    kept: set[Path] = set()
    for wanted in (0, 3, 9, "packing") if workers == 1 else (4, "packing"):
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **settings)
        while process.poll() is None:
            finished = set((output / "tokens").glob("unit-*.json"))
            if (output / "train").exists() if wanted == "packing" else len(finished) > wanted:
                break
            time.sleep(0.001)
        time.sleep(generator.uniform(0, 0.02))
        children = psutil.Process(process.pid).children() if process.poll() is None else []
        process.kill()
        process.communicate()
        assert psutil.wait_procs(children, timeout=20)[1] == []  # workers do not outlive their parent
        times = {path: path.stat().st_mtime_ns for path in (output / "tokens").glob("unit-*.json")}
        assert kept <= times.items()  # finished units were not done again
        kept = set(times.items())
    assert len(kept) > 3
    done = subprocess.run(words, capture_output=True, **settings)
    assert done.returncode == 0, done.stderr
    assert contents(output) == contents(reference)
    assert not list(output.rglob("*.tmp"))


def test_any_difference_gives_another_fingerprint(tmp_path, tokenizer_folder):
    texts = [f"document {i} " + PROSE[i][:400] for i in range(12)]
    variants = {
        "same": {},
        "again": {},
        "byte": {"texts": [*texts[:-1], texts[-1][:-1] + "!"]},
        "tokenizer": {"tokenizer": MISTRAL},
        "length": {"seq_length": 64},
        "policy": {"policy": "concat"},
        "overlap": {"overlap": 2},
        "seed": {"seed": 1},
    }
    prints = {}
    for name, options in variants.items():
        (tmp_path / name).mkdir()
        path = write_lines(tmp_path / name / "a.jsonl", [{"text": t} for t in options.pop("texts", texts)])
        used = options.pop("tokenizer", tokenizer_folder)
        prints[name] = build_here([path], used, tmp_path / name / "data", **options).fingerprint
    assert prints.pop("again") == prints["same"]
    assert len(set(prints.values())) == len(prints)


# --- what is in it ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokenizer", "dtype"), [(None, "uint16"), (MISTRAL, "uint16"), (DEEPSEEK, "uint32")])
def test_documents_come_back(tmp_path, tokenizer_folder, tokenizer, dtype):
    texts = ["a</s>b", *PROSE[:20], "nul \0 and\r\nmore ", "中文 <s>"]
    path = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    manifest = build_here([path], tokenizer or tokenizer_folder, tmp_path / "data", encoder="auto")
    opened = open_tokenizer(tmp_path / "data" / "tokenizer")
    assert manifest.dtype == dtype
    assert manifest.tokenizer == opened.info(manifest.tokenizer.file)
    store = TokenStore.open(tmp_path / "data" / "tokens")
    for doc, text in enumerate(texts):
        ids = store.tokens(doc)
        assert (ids[0], ids[-1]) == (opened.bos_id, opened.eos_id)
        assert not {opened.bos_id, opened.eos_id} & set(ids[1:-1].tolist())
        assert opened.decode(ids) == text
    offsets = [int(store.key(doc).removeprefix("a.jsonl#")) for doc in range(len(texts))]
    lines = path.read_bytes()
    assert [json.loads(lines[at:].split(b"\n")[0])["text"] for at in offsets] == texts


def test_statistics_equal_a_recount(reference, prose, tokenizer):
    manifest, texts = read_manifest(reference), [json.loads(line)["text"] for line in prose.open()]
    numbers, lengths = manifest.statistics, sorted(len(ids) + 2 for ids in tokenizer.encode_batch(texts))
    assert numbers["documents"] == len(texts) == sum(split["documents"].documents for split in manifest.splits.values())
    assert numbers["bytes"] == sum(len(text.encode()) for text in texts)
    assert numbers["tokens"] == sum(lengths) == numbers["input"]["tokens"]
    assert numbers["document_tokens"]["p50"] == lengths[(len(lengths) + 1) // 2 - 1]
    assert numbers["document_tokens"]["max"] == lengths[-1]
    for split in ("train", "validation"):
        rows = open_split(reference, split, verify="full")
        lengths = [rows.row("documents", row).seg_len for row in range(len(rows))]
        counted = numbers["rows"][split]
        assert (counted["rows"], counted["row_tokens"]) == (len(rows), len(rows) * 129)
        assert counted["padding"] == sum(129 - int(pieces.sum()) for pieces in lengths)
        assert counted["documents_cut_though_fitting"] == 0
    assert manifest.splits["train"]["documents"].shards[0].max_id < tokenizer.vocab_size


def test_datasets_opens_a_split_in_place(reference):
    loaded, ours = datasets.load_from_disk(str(reference / "train")), open_split(reference, "train")
    assert len(loaded) == len(ours)
    for row in (0, len(ours) - 1):
        assert loaded[row]["input_ids"] == ours.row("documents", row).ids.tolist()


def test_more_data_moves_no_document_between_splits(tmp_path, tokenizer_folder):
    records = [{"text": f"number {i}", "id": str(i)} for i in range(200)]
    split_of = []
    for count in (100, 200):
        path = write_lines(tmp_path / "a.jsonl", records[:count])
        output = tmp_path / str(count)
        build_here([path], tokenizer_folder, output, id_field="id", validation_fraction=0.2)
        store = TokenStore.open(output / "tokens")
        split_of.append({store.key(doc): store.split(doc) for doc in range(len(store))})
    assert split_of[0].items() <= split_of[1].items()
    assert 20 <= list(split_of[1].values()).count("validation") <= 60


@pytest.mark.parametrize("remove", [False, True])
def test_duplicates_are_counted_and_removed(tmp_path, tokenizer_folder, remove):
    texts = ["one", "two", "one ", "one", "three", "two", "one"]
    path = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    manifest = build_here([path], tokenizer_folder, tmp_path / "data", deduplicate=remove, unit_bytes=20)
    given = manifest.statistics["input"]
    assert (given["duplicates"], given["duplicates_removed"]) == (3, 3 * remove)
    store = TokenStore.open(tmp_path / "data" / "tokens")
    assert [doc for doc in range(7) if store.split(doc) is None] == ([3, 5, 6] if remove else [])
    assert manifest.statistics["documents"] == 7 - 3 * remove


def test_equal_hashes_of_different_sizes_are_no_duplicates():
    hashes = np.zeros((3, 2), np.uint64)
    assert equal_texts(hashes, np.array([5, 6, 7]))[0].tolist() == []
    assert [found.tolist() for found in equal_texts(hashes, np.array([5, 5, 7]))] == [[1], [0]]


def test_sources_with_weights(tmp_path, tokenizer_folder):
    for name in "xy":
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "a.jsonl", [{"text": f"{name} {i}"} for i in range(9)])
    words = ["--source", f"first={tmp_path / 'x'}:3", "--source", f"second={tmp_path / 'y'}:0.5"]
    done = run("build", *words, "--tokenizer", tokenizer_folder, "--seq-length", 16, "--output", tmp_path / "data")
    assert done.returncode == 0, done.stderr
    train = read_manifest(tmp_path / "data").splits["train"]
    assert {name: source.weight for name, source in train.items()} == {"first": 3, "second": 0.5}
    assert "source second" in done.stdout
