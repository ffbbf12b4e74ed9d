"""Rows chosen group by group and written shard by shard are those of all documents at once, byte for byte."""

import hashlib
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import pack as pack_module
from data_prep.cut import Breaks, count_cuts, structure_windows
from data_prep.pack import pack, total_of, write_split
from data_prep.rows import RowJob, choose_rows, shard_writer, write_rows
from data_prep.store import TokenStore
from data_prep.token_bytes import token_bytes
from data_prep.tokenizer import open_tokenizer
from storage.manifest import PackingPolicy, read_manifest
from tests.properties import examples

policies = st.builds(
    PackingPolicy,
    seq_length=st.sampled_from([31, 128, 700]),
    overlap=st.integers(1, 9),
    tail=st.sampled_from(["pad", "drop"]),
    cut=st.sampled_from(["exact", "structure"]),
)
streams = st.builds(
    PackingPolicy,
    policy=st.just("concat"),
    seq_length=st.sampled_from([31, 100, 700]),
    tail=st.sampled_from(["pad", "drop"]),
)


def job_of(data: Path, output: Path, policy: PackingPolicy, group_tokens: int) -> RowJob:
    manifest = read_manifest(data)
    places = output, data / "tokens", output / "scratch", data / manifest.tokenizer.file
    return RowJob(*places, policy, 3, manifest.target_spans, "plan", group_tokens, 4096)


def all_at_once(job: RowJob) -> tuple[dict, dict]:
    """By split and source what is counted and which shards are written, without groups, files or processes."""
    store, tokenizer = TokenStore.open(job.tokens), open_tokenizer(job.tokenizer)
    breaks, counted, shards = Breaks(token_bytes(tokenizer)), {}, {}
    for split, source in ((split, source) for split in ("train", "validation") for source in store.sources):
        documents = store.documents(split, source)
        windows = structure_windows(documents, job.policy, breaks) if job.policy.cut == "structure" else None
        packing = pack(documents.length, job.policy.row_tokens, job.policy, job.seed, windows)
        if job.targets:
            packing = packing.with_targets(documents.targets()[0])
        ends = packing.piece_off + packing.piece_len
        names = "rows", "padding", "targets", "documents_cut", "documents_cut_though_fitting", "tokens_dropped"
        counted[split, source] = (
            {name: getattr(packing, name) for name in names},
            Counter(count_cuts(documents, packing.piece_doc, ends, breaks)),
        )
        writer = shard_writer(job, split, source, str(store.dtype))
        shards[split, source] = write_split(documents, packing, writer, tokenizer.pad_id)
    return counted, shards


def in_groups(job: RowJob, workers: int) -> tuple[dict, dict]:
    chosen, counted = [], {}
    for group, counts, cuts in choose_rows(job, workers, lambda tokens: None):
        chosen.append((group, counts))
        before, kinds = counted.get(group[:2], (total_of([]), Counter()))
        counted[group[:2]] = total_of([before, counts]), kinds + Counter(cuts)
    return counted, write_rows(job, chosen, workers, lambda rows: None)


def assert_same(data: Path, folder: Path, policy: PackingPolicy, group_tokens: int, workers: int) -> None:
    one, other = (job_of(data, folder / name, policy, group_tokens) for name in ("one", "other"))
    whole, pack_module.GROUP_TOKENS = pack_module.GROUP_TOKENS, group_tokens
    try:
        counted, shards = all_at_once(one)
        counted_in_groups, shards_of_groups = in_groups(other, workers)
    finally:
        pack_module.GROUP_TOKENS = whole
    assert shards_of_groups == shards
    for place, (numbers, cuts) in counted.items():
        assert {name: getattr(counted_in_groups[place][0], name) for name in numbers} == numbers
        assert counted_in_groups[place][1] == +cuts
        for shard in shards[place]:
            assert hashlib.sha256((other.output / shard.file).read_bytes()).hexdigest() == shard.sha256


@examples(10)
@given(policy=policies | streams, group_tokens=st.sampled_from([500, 3000, 40_000, 1 << 28]))
def test_groups_do_not_show(reference, tmp_path_factory, policy, group_tokens):
    assert_same(reference, tmp_path_factory.mktemp("rows"), policy, group_tokens, 1)


@pytest.mark.parametrize("group_tokens", [300, 1 << 28])
@pytest.mark.parametrize("packing", [{"overlap": 5, "cut": "structure"}, {"policy": "concat", "tail": "drop"}])
def test_targets_of_pieces_go_with_them(chat_data, tmp_path, group_tokens, packing):
    assert_same(chat_data, tmp_path, PackingPolicy(seq_length=64, **packing), group_tokens, 1)


def test_processes_do_not_show(reference, tmp_path):
    policy = PackingPolicy(seq_length=31, cut="structure")
    assert_same(reference, tmp_path, policy, 40_000, 2)
    assert len(list((tmp_path / "other" / "train").glob("*.arrow"))) > 2
    assert len(list((tmp_path / "other" / "scratch").iterdir())) > 3
