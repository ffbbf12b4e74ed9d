"""Loss by position and gain from context are what the model computes for every target by itself."""

import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.documents import Documents
from model.llama import Llama
from tests.data_prep.texts import PROSE
from tests.model.tiny import SCALINGS, tiny
from tests.tools.trained import packed
from tools.evaluation.long_context import PositionSums, context_gain, default_limits, in_chunks, measure, positions

TOKENS, LIMITS = 24, (1, 5, 8, 24, 100)


@pytest.fixture(scope="module")
def dataset(tokenizer, tmp_path_factory):
    """Rows of 24 tokens: pieces of long documents that overlap by 5, and short documents together in a row."""
    texts = [PROSE[2][:200], *(text[:18] for text in PROSE[3:8])]
    found = packed(texts, tokenizer, tmp_path_factory.mktemp("long_context"), seq_length=TOKENS, overlap=5)
    pieces = [row.seg_len for row in rows_of(found)]
    assert len(pieces) < 30
    assert any(len(lengths) > 1 for lengths in pieces)
    return found


def rows_of(dataset):
    (source,) = dataset.sources
    return [dataset.row(source, number) for number in range(dataset.rows_per_source[source])]


def model_of(**changes) -> Llama:
    return Llama(tiny(vocab_size=600, num_hidden_layers=1, **changes), seed=3).double().eval()


def targets_alone(model, dataset, limit=TOKENS):
    """(piece, position, loss) of every target, each from a run over nothing but the tokens that it may depend on."""
    pieces = 0
    for row in rows_of(dataset):
        start = 0
        for length, context in zip(row.seg_len.tolist(), row.seg_ctx.tolist(), strict=True):
            ids = torch.from_numpy(row.ids[start : start + length].astype(np.int64))
            for place in range(max(1, context), length):
                seen = torch.arange((place - 1) // limit * limit, place)
                with torch.no_grad():
                    logits = model(ids[seen].unsqueeze(0), seen.unsqueeze(0))[0, -1]
                yield pieces, place, -float(logits.log_softmax(-1)[ids[place]])
            start, pieces = start + length, pieces + 1


def in_buckets(triples):
    """By floor(log2(position)): mean, standard error of the ratio between clusters, and count."""
    buckets = defaultdict(list)
    for piece, place, value in triples:
        buckets[place.bit_length() - 1].append((piece, value))
    return {k: clustered(pairs) for k, pairs in sorted(buckets.items())}


def clustered(pairs):
    mean = math.fsum(value for _, value in pairs) / len(pairs)
    residuals = defaultdict(float)
    for piece, value in pairs:
        residuals[piece] += value - mean
    n = len(residuals)
    squares = math.fsum(r * r for r in residuals.values())
    return mean, math.sqrt(squares * n / (n - 1)) / len(pairs) if n > 1 else None, len(pairs)


@pytest.mark.parametrize("variant", [{}, {"sliding_window": 4}, {"position_embedding": "learned"}], ids=str)
def test_every_loss_is_that_of_its_target_alone(dataset, variant):
    model = model_of(**variant)
    (source,) = dataset.sources
    found = measure(model, dataset, source, batch_samples=4, limits=LIMITS)
    whole = list(targets_alone(model, dataset))
    for limit in LIMITS:
        alone = list(targets_alone(model, dataset, limit))
        gains = [
            (piece, place, one - all_of_it[2]) for (piece, place, one), all_of_it in zip(alone, whole, strict=True)
        ]
        for sums, triples in ((found.limited[limit], alone), (found.gains[limit], gains)):
            rows = sums.by_position("x")
            for row, (mean, error, count) in zip(rows, in_buckets(triples).values(), strict=True):
                assert row["targets"] == count
                assert row["x"] == pytest.approx(mean, rel=1e-10, abs=1e-12)
                assert row["standard_error"] == (None if error is None else pytest.approx(error, rel=1e-5, abs=1e-8))


def test_buckets_add_up_to_the_plain_score(dataset):
    (source,) = dataset.sources
    found = measure(model_of(), dataset, source, batch_samples=3, limits=[8])
    rows = positions({source: found})[source]
    assert sum(row["targets"] for row in rows) == found.full.targets == len(list(targets_alone(model_of(), dataset)))
    assert sum(found.full.moments[1, :-1]) == found.full.total
    assert [(row["first"], row["last"]) for row in rows] == [(1, 1), (2, 3), (4, 7), (8, 15), (16, 24)]
    (gain,) = context_gain({source: found})[source]
    assert gain["loss"] - gain["gain"] == pytest.approx(found.full.overall("loss")["loss"], rel=1e-12)


def test_rows_beyond_max_samples_are_not_read(dataset):
    (source,) = dataset.sources
    targets = [sum(max(0, n - max(1, c)) for n, c in zip(r.seg_len, r.seg_ctx, strict=True)) for r in rows_of(dataset)]
    for rows in (1, 3, 10**6):
        found = measure(model_of(), dataset, source, batch_samples=2, max_samples=rows)
        assert found.full.targets == sum(targets[:rows])


def test_a_model_that_cannot_look_back_gains_nothing(dataset):
    (source,) = dataset.sources
    found = measure(model_of(sliding_window=1), dataset, source, batch_samples=4, limits=LIMITS)
    for limit in LIMITS:
        assert found.gains[limit].moments[2, -1] < 1e-20
    looking_back = measure(model_of(), dataset, source, batch_samples=4, limits=LIMITS)
    assert looking_back.gains[8].moments[2, -1] > 1e-6


@pytest.mark.parametrize("scaling", SCALINGS)
def test_chunks_keep_the_rotations_of_the_whole_document(dataset, scaling):
    """Chunks as long as the document change nothing; a scaling by length is that of the document."""
    model = model_of(rope_scaling=SCALINGS[scaling], max_position_embeddings=16)
    (source,) = dataset.sources
    found = measure(model, dataset, source, batch_samples=4, limits=[TOKENS])
    assert found.gains[TOKENS].moments[2, -1] == 0
    if scaling == "dynamic":
        growth = 2 * TOKENS / 16 - 1
        same = model_of(rope_theta=10000.0 * growth ** (16 / 14))
        batch = torch.randint(600, (2, TOKENS), generator=torch.Generator().manual_seed(1))
        documents = [Documents.whole_rows(2, TOKENS) for _ in range(2)]
        model.hidden_states(batch, documents[0])
        expected = same.hidden_states(batch, in_chunks(documents[1], 8))
        torch.testing.assert_close(
            model.hidden_states(batch, in_chunks(documents[0], 8)), expected, rtol=1e-5, atol=1e-6
        )


@given(
    st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=4), min_size=1, max_size=4),
    st.integers(1, 13),
    st.integers(0, 2**32 - 1),
)
def test_sums_by_position_and_their_standard_errors(rows, split, seed):
    generator = np.random.default_rng(seed)
    tokens, total, triples, piece = 48, PositionSums(48), [], 0
    for lengths in rows:
        spans = [*lengths, tokens - sum(lengths)]
        position_ids = np.concatenate([np.arange(n) for n in spans])[None]
        values, counted = generator.normal(5, 2, (1, tokens)), generator.random((1, tokens)) < 0.8
        part = PositionSums(tokens)
        part.add(position_ids, counted, values)
        total += part
        numbers = np.repeat(np.arange(len(spans)), spans) + piece
        piece += len(spans)
        for p, place, value in zip(numbers[counted[0]], position_ids[counted], values[counted], strict=True):
            triples.append((p, int(place) + 1, float(value)))
    found = total.by_position("x")
    for row, (mean, error, count) in zip(found, in_buckets(triples).values(), strict=True):
        assert (row["targets"], row["x"]) == (count, pytest.approx(mean))
        assert row["standard_error"] == (None if error is None else pytest.approx(error, rel=1e-6, abs=1e-6))
    if triples:
        mean, error, count = clustered([(p, value) for p, _, value in triples])
        assert (total.targets, total.overall("x")["x"]) == (count, pytest.approx(mean))
        assert total.overall("x")["standard_error"] == (None if error is None else pytest.approx(error, abs=1e-6))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(1, 25))
def test_chunks_cut_documents_and_nothing_else(lengths, chunk):
    position_ids = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    cut = in_chunks(Documents.from_position_ids(position_ids), chunk)
    assert torch.equal(cut.position_ids, position_ids)
    starts = (position_ids[0] % chunk == 0).nonzero().flatten().tolist()
    assert cut.cu_seqlens.tolist() == [*starts, sum(lengths)]
    assert cut.lengths == cut.cu_seqlens.diff().tolist()


def test_default_limits_are_shares_of_a_row():
    assert default_limits(4096) == [256, 512, 1024, 2048]
    assert default_limits(3) == [1]
