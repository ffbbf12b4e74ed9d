"""The shard format: what is written is what every reader sees, and no damage passes unnoticed."""

import contextlib
import json
import multiprocessing
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
from datasets import Dataset, load_from_disk
from hypothesis import given
from hypothesis import strategies as st

from storage.manifest import NOT_FINGERPRINTED, Manifest, fingerprint, read_manifest, save_manifest, token_dtype
from storage.shards import RowBlock, ShardWriter, open_split, rows_per_batch
from tests.properties import examples
from tests.training.corpus import build, document_tokens

LENGTHS = {"books": [9] * 4200 + [5] * 900 + [40] * 20, "web": list(range(1, 60))}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("pristine")
    build(directory, LENGTHS, seq_length=8, splits=("train", "validation"), rows_per_shard=2048, overlap=2)
    return directory


@pytest.fixture
def data(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "data"))


def shard_files(data: Path) -> list[Path]:
    return sorted((data / "train").glob("shard-books-*.arrow"))


def test_rows_hold_what_their_pieces_say(pristine):
    dataset = open_split(pristine, "train", verify="full")
    assert dataset.sources == ["books", "web"]
    assert len(dataset) == sum(dataset.rows_per_source.values())
    lengths = [length for source in LENGTHS.values() for length in source]
    targets = 0
    for source, rows in dataset.rows_per_source.items():
        for number in range(rows):
            row = dataset.row(source, number)
            assert not row.ids.flags.owndata
            pieces = list(zip(row.seg_doc, row.seg_off, row.seg_len, strict=True))
            tokens = np.concatenate([document_tokens(int(d), lengths[d], 1000)[o : o + n] for d, o, n in pieces])
            assert row.ids[: len(tokens)].tolist() == tokens.tolist()
            targets += int((row.seg_len - np.maximum(row.seg_ctx, 1)).sum())
    entries = dataset.manifest.splits["train"].values()
    assert targets == sum(entry.targets for entry in entries) == sum(lengths) - len(lengths)


def test_datasets_pyarrow_and_this_reader_agree(pristine):
    dataset = open_split(pristine, "train")
    whole = load_from_disk(str(pristine))
    assert set(whole) == {"train", "validation"}
    opened = load_from_disk(str(pristine / "train"))
    assert len(opened) == len(dataset) == len(whole["train"])
    assert opened.features["input_ids"].length == 9
    files = [Path(entry["filename"]) for entry in opened.cache_files]
    assert all(file.parent == pristine / "train" for file in files), "opened in place, not copied"
    first = 0
    for source in dataset.sources:
        for shard in dataset.manifest.splits["train"][source].shards:
            direct = Dataset.from_file(str(pristine / shard.file))
            table = pa.ipc.open_stream(pristine / shard.file).read_all()
            assert len(direct) == table.num_rows == shard.rows
            for offset in range(0, shard.rows, 97):
                ours = dataset.row(source, first + offset)
                for view in (direct[offset], table.slice(offset, 1).to_pylist()[0]):
                    assert view["input_ids"] == ours.ids.tolist()
                    assert [view[name] for name in ours._fields[1:]] == [a.tolist() for a in ours[1:]]
            first += shard.rows
        first = 0
    assert opened[len(dataset) - 1]["input_ids"] == dataset.row("web", dataset.rows_per_source["web"] - 1).ids.tolist()


def cut_at_message(data: Path) -> None:
    path = shard_files(data)[0]
    with path.open("rb") as file:
        messages = pa.ipc.MessageReader.open_stream(pa.PythonFile(file))
        for _ in ("schema", "first batch"):
            messages.read_next_message()
        boundary = file.tell()
    assert pa.ipc.open_stream(path.read_bytes()[:boundary]).read_all().num_rows == 1024, "Arrow itself sees no error"
    path.write_bytes(path.read_bytes()[:boundary])


def cut_at_message_and_fill(data: Path) -> None:
    size = shard_files(data)[0].stat().st_size
    cut_at_message(data)
    os.truncate(shard_files(data)[0], size)


def cut_end_marker(data: Path) -> None:
    os.truncate(shard_files(data)[0], shard_files(data)[0].stat().st_size - 8)


def append(data: Path) -> None:
    with shard_files(data)[0].open("ab") as file:
        file.write(b"\0")


def overwrite_beginning(data: Path) -> None:
    with shard_files(data)[0].open("r+b") as file:
        file.write(b"\x55" * 64)


def flip_bit(data: Path) -> None:
    content = bytearray(shard_files(data)[0].read_bytes())
    content[len(content) // 3] ^= 4
    shard_files(data)[0].write_bytes(content)


def exchange(data: Path) -> None:
    one, other = shard_files(data)[:2]
    assert one.stat().st_size == other.stat().st_size
    one.rename(data / "aside")
    other.rename(one)
    (data / "aside").rename(other)


def other_length(data: Path) -> None:
    manifest = read_manifest(data)
    save_manifest(data, manifest.model_copy(update={"packing": manifest.packing.model_copy(update={"seq_length": 9})}))


def edit_manifest(data: Path) -> None:
    path = data / "manifest.json"
    path.write_text(path.read_text().replace('"vocab_size": 1000', '"vocab_size": 1001'))


def old_version(data: Path) -> None:
    path = data / "manifest.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 0'))


def cut_manifest(data: Path) -> None:
    os.truncate(data / "manifest.json", 100)


DAMAGE = {
    cut_at_message: "shard-books-00000.arrow is [0-9]+ bytes shorter than its manifest says",
    cut_at_message_and_fill: "shard-books-00000.arrow holds 1024 rows, its manifest says 2048",
    cut_end_marker: "shard-books-00000.arrow is 8 bytes shorter",
    append: "shard-books-00000.arrow is 1 bytes longer",
    overwrite_beginning: "shard-books-00000.arrow is not a readable Arrow stream",
    exchange: "00000.arrow holds shard 1 of source books in split train, not shard 0 .*exchanged",
    other_length: "another schema than the manifest's 10 x uint16",
    lambda data: shard_files(data)[0].unlink(): "shard-books-00000.arrow is missing",
    lambda data: (data / "manifest.json").unlink(): "not a prepared data set: it has no manifest.json",
    edit_manifest: "manifest.json was changed after it was written",
    old_version: "format version 0, this program reads 1",
    cut_manifest: "manifest.json cannot be read",
}


@pytest.mark.parametrize(("damage", "sentence"), DAMAGE.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_each_damage_has_its_own_sentence(data, damage, sentence):
    damage(data)
    with pytest.raises(ValueError, match=sentence) as error:
        open_split(data, "train")
    assert "\n" not in str(error.value)


def test_a_flipped_bit_is_found_by_full_verification(data):
    flip_bit(data)
    open_split(data, "train")
    with pytest.raises(ValueError, match=r"shard-books-00000\.arrow has changed: its sha256 is not the manifest's"):
        open_split(data, "train", verify="full")


@given(st.data())
@examples(100)
def test_no_flipped_bit_of_a_shard_escapes_full_verification(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("flip")
    build(directory, {"books": list(range(1, 60))}, seq_length=8)
    dataset, path = open_split(directory, "train"), directory / "train/shard-books-00000.arrow"
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    assert all("shard-books-00000.arrow" in problem for _, problem in dataset.verify(full=True))
    assert len(list(dataset.verify())) == 1, "quick verification reports or passes, but does not fail itself"


def test_unverified_damage_is_still_an_error_when_met(data):
    cut_at_message(data)
    with pytest.raises(ValueError, match="does not hold the 2048 rows"):
        open_split(data, "train", verify="none").row("books", 0)


CHANGES = {
    "shortened": (lambda shard, other: os.truncate(shard, shard.stat().st_size // 2), "has lost .* bytes since"),
    "swapped": (lambda shard, other: other.rename(shard), "was replaced or written to since"),
    "rewritten": (
        lambda shard, other: shard.write_bytes(other.read_bytes()),
        "was replaced or written to since|has lost",
    ),
    "missing": (lambda shard, other: shard.unlink(), r"can no longer be read \(No such file or directory\)"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_shard_that_changes_while_it_is_read_is_named(data, monkeypatch, kind):
    monkeypatch.setattr("storage.mapped.LOOK_SECONDS", 0)
    dataset = open_split(data, "train")
    shard, other, *_ = shard_files(data)
    assert len(dataset.row("books", 0).ids)
    change, words = CHANGES[kind]
    change(shard, other)
    with pytest.raises(ValueError, match=f"{shard} {words}"):
        dataset.row("books", 1)
    with pytest.raises(ValueError, match=f"{shard} {words}"):
        list(dataset.blocks("books"))


def test_unknown_split_and_row_and_small_model_are_refused(pristine):
    with pytest.raises(ValueError, match="no split 'test': it has train, validation"):
        open_split(pristine, "test")
    with pytest.raises(ValueError, match=r"holds token id 9.., but the model's vocab_size is 500"):
        open_split(pristine, "train", vocab_size=500)
    dataset = open_split(pristine, "train")
    for source, row in (("web", len(dataset)), ("web", -1), ("none", 0)):
        with pytest.raises(IndexError, match="has no row"):
            dataset.row(source, row)


@given(st.data())
@examples(60)
def test_changing_anything_in_the_manifest_changes_the_fingerprint(pristine, data):
    content = json.loads((pristine / "manifest.json").read_text())
    assert fingerprint(content) == content["fingerprint"]
    assert fingerprint(content | {"created_at": "another day"}) == content["fingerprint"]
    node = content
    while True:
        keys = [k for k in (node if isinstance(node, dict) else range(len(node))) if k not in NOT_FINGERPRINTED]
        key = data.draw(st.sampled_from(keys))
        if not isinstance(node[key], dict | list) or not node[key]:
            break
        node = node[key]
    node[key] = "another" if node[key] != "another" else "other"
    assert fingerprint(content) != content["fingerprint"]


@given(st.data())
@examples(100)
def test_no_changed_byte_of_the_manifest_is_believed(pristine, tmp_path_factory, data):
    original = (pristine / "manifest.json").read_bytes()
    content = bytearray(original)
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    directory = tmp_path_factory.mktemp("manifest")
    (directory / "manifest.json").write_bytes(content)
    with contextlib.suppress(ValueError):
        manifest = read_manifest(directory)
        same = {"created_at": manifest.created_at}
        assert manifest == Manifest.model_validate(json.loads(original) | same)


def test_manifest_refuses_what_cannot_be(pristine):
    content = read_manifest(pristine).model_dump()
    shard = content["splits"]["train"]["web"]["shards"][0]
    for change, sentence in [
        ({"dtype": "uint32"}, "dtype uint32 does not belong to a vocabulary of 1000"),
        ({"splits": {"train": {"../up": content["splits"]["train"]["web"]}}}, "should match pattern"),
        ({"tokenizer": content["tokenizer"] | {"vocab_size": shard["max_id"]}}, "outside the tokenizer's vocabulary"),
        ({"unknown": 1}, "Extra inputs are not permitted"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            Manifest.model_validate(content | change)
    content["splits"]["train"]["web"]["weight"] = 1.0
    with pytest.raises(ValueError, match="give a weight to every source or to none"):
        Manifest.model_validate(content)


def test_dtype_and_batch_sizes_at_their_limits():
    assert (token_dtype(65_536), token_dtype(65_537)) == ("uint16", "uint32")
    assert rows_per_batch(4097, "uint16") == 1024
    assert rows_per_batch(4097, "uint32") == 512
    assert rows_per_batch(2, "uint16") == 1024
    assert rows_per_batch(10_000_001, "uint32") == 1


def block(rows: int, row_tokens: int) -> RowBlock:
    ids = np.random.default_rng(0).integers(0, 1000, (rows, row_tokens)).astype(np.uint16)
    ones, zeros = np.full(rows, row_tokens, np.int32), np.zeros(rows, np.int64)
    return RowBlock(ids, np.arange(rows + 1, dtype=np.int32), ones, zeros.astype(np.int32), zeros, zeros)


def test_an_interrupted_writer_leaves_neither_shard_nor_manifest(tmp_path):
    def interrupted() -> None:
        with ShardWriter(tmp_path, "train", "books", 9, "uint16") as writer:
            writer.write(block(1024, 9))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    with pytest.raises(ValueError, match="not a prepared data set"):
        open_split(tmp_path, "train")


def test_opening_maps_but_does_not_read(tmp_path):
    with ShardWriter(tmp_path, "train", "books", 4097, "uint16") as writer:
        writer.write(block(1024, 4097))
    small = build(tmp_path / "small", {"books": [30] * 10}, seq_length=4096)
    shards = []
    for number in range(1000):
        name = f"train/link-{number}.arrow"
        os.link(tmp_path / writer.shards[0].file, tmp_path / name)
        shards.append(writer.shards[0].model_copy(update={"file": name}))
    entry = small.splits["train"]["books"].model_copy(update={"rows": 1024 * len(shards), "shards": shards})
    save_manifest(tmp_path, small.model_copy(update={"splits": {"train": {"books": entry}}}))

    dataset = open_split(tmp_path, "train", verify="none")
    process = psutil.Process()
    before, files = process.memory_info().rss, process.num_fds()
    for number in range(len(shards)):
        dataset.find(0, number * 1024 + 500)
    mapped = len(shards) * writer.shards[0].bytes
    assert process.memory_info().rss - before < mapped / 10
    assert process.num_fds() == files
    assert dataset.row("books", 1024 * 999 + 7).ids.tolist() == block(1024, 4097).ids[7].tolist()


def test_datasets_travel_to_other_processes(pristine):
    dataset = open_split(pristine, "train")
    expected = dataset.row("web", 3).ids.tolist()
    assert len(pickle.dumps(dataset)) < 10_000, "mappings must stay behind"
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            assert pool.apply(row_ids, (dataset, "web", 3)) == expected


def row_ids(dataset, source: str, row: int) -> list[int]:
    return dataset.row(source, row).ids.tolist()
