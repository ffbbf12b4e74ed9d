"""Which tokens carry loss: kept through cutting, packing and reading, for any documents, masks and policies."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.targets import Spans, joined, problem_of, spans_of
from data_prep.verify import _target_problems
from model.config import ModelConfig
from storage.shards import open_split
from tests.data_prep.test_pack import policies
from tests.properties import examples
from tests.training.corpus import build
from training.data import NO_TARGET, make_batch
from training.objective import Masking
from training.sections import ObjectiveConfig

MASKS = st.lists(st.lists(st.booleans(), min_size=1, max_size=70).map(np.array), min_size=1, max_size=30)


@given(MASKS)
def test_spans_are_where_the_masks_hold(masks):
    spans = spans_of(masks)
    for i, mask in enumerate(masks):
        mine = slice(*spans.splits[i : i + 2])
        found = np.zeros(len(mask), bool)
        for begin, end in zip(spans.begin[mine], spans.end[mine], strict=True):
            assert begin < end
            assert not found[max(begin - 1, 0) : end].any()  # none touches the one before
            found[begin:end] = True
        assert (found == mask).all()
    assert spans.tokens == sum(int(mask.sum()) for mask in masks)
    assert all(np.array_equal(a, b) for a, b in zip(spans, joined([spans_of([mask]) for mask in masks]), strict=True))


@given(MASKS, st.data())
def test_selected_and_clipped_spans_are_those_of_the_masks(masks, data):
    chosen = np.array(data.draw(st.lists(st.integers(0, len(masks) - 1), max_size=40)), np.int64)
    low = np.array([data.draw(st.integers(0, len(masks[i]))) for i in chosen], np.int64)
    high = np.array([data.draw(st.integers(0, len(masks[i]))) for i in chosen], np.int64)
    found = spans_of(masks).select(chosen).clip(low, high)
    kept = []
    for i, first, end in zip(chosen, low, high, strict=True):
        place = np.arange(len(masks[i]))
        kept.append(masks[i] & (place >= first) & (place < end))
    expected = spans_of(kept)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


@given(MASKS, policies(), st.integers(1, 5))
@examples(60)
def test_batches_ask_for_the_tokens_that_carry_loss_and_no_others(tmp_path_factory, masks, policy, size):
    directory = tmp_path_factory.mktemp("targets")
    options = {"policy": policy.policy, "overlap": policy.overlap, "tail": policy.tail}
    lengths = [len(mask) for mask in masks]
    if policy.tail == "drop" and policy.policy == "concat" and sum(lengths) <= policy.seq_length:
        return  # no row at all
    manifest = build(directory, {"chats": lengths}, policy.seq_length, masks={"chats": masks}, **options)
    dataset = open_split(directory, "train")
    assert list(_target_problems(dataset)) == []
    seen = 0
    for first in range(0, len(dataset), size):
        numbers = np.arange(first, min(first + size, len(dataset)))
        batch = make_batch(dataset, np.zeros_like(numbers), numbers, size=size)
        assert batch["num_targets"] == (batch["targets"] != NO_TARGET).sum()
        seen += batch["num_targets"]
        for j, number in enumerate(numbers.tolist()):
            row = dataset.row("chats", number)
            expected, at = [NO_TARGET] * policy.seq_length, 0
            for length, context, doc, off in zip(*(column.tolist() for column in row[1:]), strict=True):
                for i in range(max(context, 1), length):
                    if masks[doc][off + i]:
                        expected[at + i - 1] = int(row.ids[at + i])
                at += length
            assert batch["targets"][j].tolist() == expected
    assert seen == manifest.splits["train"]["chats"].targets
    if policy.tail == "pad":  # every token but a document's first is in one row a target
        assert seen == sum(int(mask[1:].sum()) for mask in masks)


def test_masks_fall_on_tokens_that_carry_loss_alone(tmp_path):
    generator = np.random.default_rng(0)
    masks = [generator.random(length) < 0.4 for length in generator.integers(2, 60, 30)]
    manifest = build(tmp_path, {"chats": [len(mask) for mask in masks]}, 24, overlap=3, masks={"chats": masks})
    dataset = open_split(tmp_path, "train")
    model = ModelConfig(vocab_size=1001, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    masking = Masking(ObjectiveConfig(name="masked", mask_ratio=0.5), model, manifest, seed=0, purpose="training")
    hidden = 0
    for number in range(len(dataset)):
        batch = make_batch(dataset, np.array([0]), np.array([number]))
        carries = np.zeros(24, bool)
        for begin, end in dataset.spans("chats", number).tolist():
            carries[begin:end] = True
        masked = masking(batch, np.array([number]))["targets"][0].numpy() >= 0
        assert not (masked & ~carries).any()
        hidden += masked.sum()
    assert hidden > 50


@pytest.mark.parametrize(
    ("begin", "end", "words"),
    [
        ([2, 9], [4, 11], None),
        ([2, 4], [4, 6], "do not ascend"),
        ([2, 5], [2, 6], "are empty"),
        ([0, 9], [4, 11], "outside"),
        ([2, 9], [4, 13], "outside"),
        ([2, 5], [4, 9], "outside"),
        ([-3, 9], [-1, 11], "outside"),
    ],
)
def test_impossible_spans_are_found(begin, end, words):
    """Of one row with the pieces 0-7 and 8-12, of which the first tokens carry no loss, after a row with none."""
    possible = Spans(np.array([0, 1, 3]), np.array([1, 1, 9]), np.array([7, 8, 12]))
    found = problem_of(Spans(np.array([0, 0, 2]), np.array(begin), np.array(end)), possible)
    assert found is None if words is None else words in found
