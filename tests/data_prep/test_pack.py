"""Packing: nothing lost, nothing leaked, nothing cut that fits, for both policies and any lengths."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from data_prep import pack as pack_module
from data_prep.pack import pack, write_split
from storage.manifest import PackingPolicy
from storage.rows import row_block
from storage.shards import Row, ShardWriter
from tests.properties import examples
from tests.training.corpus import PAD, MadeDocuments

LENGTHS = st.lists(st.integers(1, 70), min_size=1, max_size=60)


@st.composite
def policies(draw, **fixed) -> PackingPolicy:
    seq_length = draw(st.integers(1, 24))
    kind = fixed.get("policy") or draw(st.sampled_from(["bestfit", "concat"]))
    overlap = draw(st.integers(1, seq_length)) if kind == "bestfit" else 1
    tail = fixed.get("tail") or draw(st.sampled_from(["pad", "drop"]))
    return PackingPolicy(policy=kind, seq_length=seq_length, overlap=overlap, tail=tail)


def targets_seen(packing) -> Counter:
    """How often each (document, offset) is a target."""
    seen = Counter()
    pieces = (packing.piece_doc, packing.piece_off, packing.piece_len, packing.piece_ctx)
    for doc, off, length, context in zip(*(a.tolist() for a in pieces), strict=True):
        seen.update((doc, o) for o in range(off + max(context, 1), off + length))
    return seen


@given(LENGTHS, policies(tail="pad"), st.integers(0, 3))
def test_every_token_but_a_documents_first_is_a_target_exactly_once(lengths, policy, seed):
    packing = pack(np.array(lengths), policy.row_tokens, policy, seed)
    assert targets_seen(packing) == {(d, o): 1 for d, n in enumerate(lengths) for o in range(1, n)}
    assert packing.targets == sum(lengths) - len(lengths)
    assert packing.tokens_dropped == 0


@given(LENGTHS, policies(), st.integers(0, 3))
def test_counts_equal_a_recount(lengths, policy, seed):
    packing = pack(np.array(lengths), policy.row_tokens, policy, seed)
    pieces = list(zip(packing.piece_doc.tolist(), packing.piece_off.tolist(), packing.piece_len.tolist(), strict=True))
    fill = [int(packing.piece_len[a:b].sum()) for a, b in pairwise(packing.row_splits)]
    assert all(0 < n <= policy.row_tokens for n in fill)
    assert packing.padding == sum(policy.row_tokens - n for n in fill)
    assert all(off >= 0 and off + n <= lengths[doc] and n for doc, off, n in pieces)
    assert (packing.piece_ctx <= packing.piece_len).all()
    cut = [d for d, n in enumerate(lengths) if (d, 0, n) not in pieces]
    assert packing.documents_cut == len(cut)
    assert packing.documents_cut_though_fitting == sum(lengths[d] <= policy.row_tokens for d in cut)
    covered = {(doc, o) for doc, off, n in pieces for o in range(off, off + n)}
    assert packing.tokens_dropped == sum(lengths) - len(covered)


@given(LENGTHS, policies(policy="bestfit"))
def test_bestfit_cuts_nothing_that_fits_and_fills_all_rows_but_one_to_half(lengths, policy):
    packing = pack(np.array(lengths), policy.row_tokens, policy, 0)
    fill = np.diff(np.concatenate([[0], np.cumsum(packing.piece_len)])[packing.row_splits])
    assert (fill < policy.row_tokens / 2).sum() <= (policy.tail == "pad")
    if policy.tail == "pad":
        assert packing.documents_cut_though_fitting == 0
        assert packing.documents_cut == sum(n > policy.row_tokens for n in lengths)


@given(st.lists(st.integers(1, 40), max_size=80), st.integers(40, 60))
def test_grouped_best_fit_decreasing_equals_placing_one_by_one(sizes, capacity):
    sizes = np.array(sorted(sizes, reverse=True), np.int64)
    row = np.array(list(pack_module._best_fit_decreasing(sizes, capacity)), np.int64)
    rooms = []
    for size in sizes.tolist():
        room = min((r for r in rooms if r >= size), default=None)
        if room is None:
            rooms.append(capacity - size)
        else:
            rooms[rooms.index(room)] -= size
    filled = np.bincount(row, weights=sizes, minlength=len(rooms)) if len(row) else np.array([])
    assert sorted(capacity - filled) == sorted(rooms)


@given(LENGTHS, st.integers(1, 24))
def test_concat_is_the_stream_cut_at_fixed_length(lengths, seq_length):
    policy = PackingPolicy(policy="concat", seq_length=seq_length)
    packing = pack(np.array(lengths), policy.row_tokens, policy, 1)
    stream = [(d, o) for d, n in enumerate(lengths) for o in range(n)]
    expected = [stream[i : i + seq_length + 1] for i in range(0, max(len(stream) - 1, 1), seq_length)]
    assert sorted(map(tuple, rows_of(packing))) == sorted(map(tuple, expected))


def rows_of(packing) -> list[list[tuple[int, int]]]:
    pieces = list(zip(packing.piece_doc.tolist(), packing.piece_off.tolist(), packing.piece_len.tolist(), strict=True))
    bounds = pairwise(packing.row_splits.tolist())
    return [[(doc, o) for doc, off, n in pieces[a:b] for o in range(off, off + n)] for a, b in bounds]


@given(LENGTHS, policies(), st.integers(0, 99))
def test_seed_changes_the_order_of_rows_only(lengths, policy, seed):
    one, same, other = (pack(np.array(lengths), policy.row_tokens, policy, s) for s in (seed, seed, seed + 1))
    assert rows_of(one) == rows_of(same)
    assert sorted(rows_of(one)) == sorted(rows_of(other))


@given(LENGTHS, policies(tail="pad"), st.integers(1, 200))
@examples(50)
def test_groups_lose_nothing_and_keep_rows_near(lengths, policy, group_tokens):
    whole = pack_module.GROUP_TOKENS
    pack_module.GROUP_TOKENS = group_tokens
    try:
        packing = pack(np.array(lengths), policy.row_tokens, policy, 0)
    finally:
        pack_module.GROUP_TOKENS = whole
    assert targets_seen(packing) == {(d, o): 1 for d, n in enumerate(lengths) for o in range(1, n)}
    if policy.policy == "bestfit":
        group = np.cumsum(lengths) // group_tokens
        assert (np.diff(group[packing.piece_doc]) >= 0).all()


def test_no_documents_give_no_rows():
    for kind in ("bestfit", "concat"):
        packing = pack(np.empty(0, np.int64), 9, PackingPolicy(policy=kind, seq_length=8), 0)
        assert (packing.rows, packing.padding, packing.targets, packing.tokens_dropped) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"seq_length": 8, "overlap": 9}, "overlap 9 must not exceed seq_length 8"),
        ({"seq_length": 8, "overlap": 2, "policy": "concat"}, "no effect with policy concat"),
        ({"seq_length": 0}, "greater than or equal to 1"),
        ({"seq_length": 8, "polcy": "concat"}, "Extra inputs are not permitted"),
    ],
)
def test_impossible_policies_are_refused(fields, sentence):
    with pytest.raises(ValidationError, match=sentence):
        PackingPolicy(**fields)


@given(LENGTHS, policies(), st.sampled_from([1000, 65_536, 65_537]))
@examples(40)
def test_written_rows_hold_the_documents_tokens(tmp_path_factory, lengths, policy, vocab_size):
    directory = tmp_path_factory.mktemp("rows")
    documents = MadeDocuments(lengths, vocab_size, first=100)
    packing = pack(documents.length, policy.row_tokens, policy, 0)
    dtype = "uint16" if vocab_size <= 65_536 else "uint32"
    writer = ShardWriter(directory, "train", "books", policy.row_tokens, dtype)
    writer.batch_rows, writer.shard_rows = 4, 8
    counted = []
    shards = write_split(documents, packing, writer, PAD, counted.append)
    assert sum(counted) == packing.rows == sum(shard.rows for shard in shards)
    assert all(shard.rows == 8 for shard in shards[:-1])
    rows = [
        row
        for shard in shards
        for batch in pa.ipc.open_stream(directory / shard.file)
        for row in block_rows(row_block(batch))
    ]
    for row, expected, bounds in zip(rows, rows_of(packing), pairwise(packing.row_splits), strict=True):
        assert row.ids.dtype == dtype
        tokens = [int(documents.tokens(doc)[off]) for doc, off in expected]
        assert row.ids.tolist() == tokens + [PAD] * (policy.row_tokens - len(tokens))
        pieces = slice(*bounds)
        assert row.seg_doc.tolist() == (100 + packing.piece_doc[pieces]).tolist()
        assert row.seg_off.tolist() == packing.piece_off[pieces].tolist()
        assert row.seg_len.tolist() == packing.piece_len[pieces].tolist()
        assert row.seg_ctx.tolist() == packing.piece_ctx[pieces].tolist()
    if rows:
        assert min(shard.min_id for shard in shards) == min(int(row.ids.min()) for row in rows)
        assert max(shard.max_id for shard in shards) == max(int(row.ids.max()) for row in rows)


def block_rows(block) -> list[Row]:
    bounds = block.splits.tolist()
    return [
        Row(block.ids[j], *(column[bounds[j] : bounds[j + 1]] for column in block.pieces))
        for j in range(len(block.ids))
    ]
