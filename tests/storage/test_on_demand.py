"""A data set whose shards lie in object storage reads as if they were here, in no more bytes than were allowed."""

import json
import multiprocessing
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from storage import remote, transfer
from storage.documents import write_manifest
from storage.manifest import Manifest, PackingPolicy, TokenizerInfo, read_manifest
from storage.on_demand import ON_DEMAND_FILE, pull_on_demand
from storage.remote import Remote
from storage.rows import RowBlock, rows_per_batch
from storage.shards import ShardWriter, open_split
from storage.transfer import listing_of, push, read_listing
from tests.s3 import CuttingProxy, environment, s3  # noqa: F401 (a fixture)
from tools.push import verified

ROW_TOKENS, SHARDS = 33, 6


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Six shards of one block each."""
    folder, rows = tmp_path_factory.mktemp("data") / "data", rows_per_batch(ROW_TOKENS, "uint16")
    generator = np.random.default_rng(0)
    with ShardWriter(folder, "train", "a", ROW_TOKENS, "uint16", rows_per_shard=rows) as writer:
        for number in range(SHARDS):
            ids = generator.integers(0, 900, (rows, ROW_TOKENS), np.uint16)
            ones = np.ones(rows, np.int32)
            writer.write(RowBlock(ids, np.arange(rows + 1, dtype=np.int32), ones * ROW_TOKENS, ones * 0,
                                  ones.astype(np.int64) * number, ones.astype(np.int64) * 0))  # fmt: skip
    count = dict.fromkeys(("documents", "bytes", "tokens", "targets"), 1)
    source = count | {"rows": rows * SHARDS, "shards": [shard.model_dump() for shard in writer.shards]}
    tokenizer = {"type": "sentencepiece", "file": "t", "sha256": "0" * 64, "vocab_size": 1000}
    tokenizer |= {"bos_id": None, "eos_id": None, "pad_id": 0, "mask_id": None}
    policy = PackingPolicy(seq_length=ROW_TOKENS - 1)
    fields = {"created_at": "now", "created_by": {}, "inputs": {}, "dtype": "uint16", "packing": policy, "seed": 0}
    fields |= {"tokenizer": TokenizerInfo(**tokenizer), "splits": {"train": {"a": source}}}
    write_manifest(folder, Manifest.model_validate(fields))
    return folder


@pytest.fixture(scope="module")
def url(data, s3):  # noqa: F811
    names = [path.relative_to(data).as_posix() for path in data.rglob("*") if path.is_file()]
    push(data, listing_of(data, "data set", "manifest.json", names), Remote("s3://ours/rows"), lambda size: None)
    return "s3://ours/rows"


@pytest.fixture
def limit(data):
    return 2 * max(shard.bytes for shard in read_manifest(data).splits["train"]["a"].shards)


@pytest.fixture
def folder(url, limit, tmp_path):
    pull_on_demand(Remote(url), read_listing(Remote(url)), tmp_path / "data", limit)
    return tmp_path / "data"


def here(folder: Path) -> int:
    return sum(
        path.stat().st_size for path in (folder / "train").iterdir() if "shard-" in path.name and "0000" in path.name
    )


def read_rows(folder, data, seed, count=60) -> None:
    """Rows in another order for each reader, compared with those of the whole data set."""
    found, expected = open_split(folder, "train"), open_split(data, "train")
    for row in np.random.default_rng(seed).integers(0, len(expected), count).tolist():
        np.testing.assert_array_equal(found.row("a", row).ids, expected.row("a", row).ids)


def test_rows_are_those_of_the_whole_set_within_the_limit(folder, data, limit):
    assert here(folder) == 0
    found, expected = pickle.loads(pickle.dumps(open_split(folder, "train"))), open_split(data, "train")
    assert len(found) == len(expected)
    for row in [*range(0, len(expected), 300), *range(len(expected) - 1, 0, -300)]:
        np.testing.assert_array_equal(found.row("a", row).ids, expected.row("a", row).ids)
        assert 0 < here(folder) <= limit
    assert [problem for _, problem in open_split(folder, "train").verify(full=True) if problem] == []


def test_several_processes_read_at_once(folder, data, limit):
    context = multiprocessing.get_context("fork")
    readers = [context.Process(target=read_rows, args=(folder, data, seed)) for seed in range(3)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(100)
    assert [reader.exitcode for reader in readers] == [0, 0, 0]
    assert here(folder) <= limit


def test_a_lost_connection_and_a_killed_reader_cost_nothing(folder, data, s3, monkeypatch):  # noqa: F811
    monkeypatch.setattr(transfer, "RANGE_BYTES", 20_000)
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.01)
    first = sorted((data / "train").glob("shard-*"))[0]
    (folder / "train" / f".{first.name}.partial").write_bytes(first.read_bytes()[:30_000])  # of a killed reader
    with CuttingProxy(s3, 3, 9_000) as proxy, environment(AWS_ENDPOINT_URL=proxy.address):
        read_rows(folder, data, 0, count=20)
        assert proxy.cut == 3


def test_a_changed_shard_is_never_read(folder, data, url, s3):  # noqa: F811
    file = f"train/{sorted((data / 'train').glob('shard-*'))[0].name}"
    place = Remote(url).child(file)
    place.write(bytes(reversed((data / file).read_bytes())))
    with pytest.raises(ValueError, match="is not what was pushed: its sha256"):
        open_split(folder, "train").row("a", 0)
    assert not (folder / file).exists()
    place.put(data / file)
    open_split(folder, "train").row("a", 0)


def test_what_cannot_be_is_one_sentence(folder, url, limit, tmp_path):
    listing = read_listing(Remote(url))
    with pytest.raises(ValueError, match="at least two shards must fit"):
        pull_on_demand(Remote(url), listing, tmp_path / "small", limit - 1)
    with pytest.raises(ValueError, match="only the shards of a data set come on demand"):
        pull_on_demand(Remote(url), listing._replace(kind="checkpoint"), tmp_path / "other", limit)
    with pytest.raises(ValueError, match="has its shards elsewhere"):
        verified(folder)
    shutil.copytree(folder, tmp_path / "damaged")
    (tmp_path / "damaged" / ON_DEMAND_FILE).write_text(json.dumps({"url": url}))
    with pytest.raises(ValueError, match=r"on_demand\.json cannot be read .* pull the data set again"):
        open_split(tmp_path / "damaged", "train")
