"""Attention of some columns' queries, over the keys that they see and no others, equals its formula over whole rows.

The calls of the variable-length kernel, which needs a GPU, are carried out here by its definition.
"""

from unittest import mock

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from model import block_attention
from model.block_attention import among, attend_planned, plan_blocks
from model.documents import Documents
from model.part_attention import RowPart, attend_flex_part, plan_varlen
from model.segments import keys_of, seen_keys, segments
from model.visibility import Visibility
from tests.model.test_attention import both_copies, qkv, rows_of_documents, what_may_be_visible
from tests.model.tiny import formula, positions
from tests.properties import examples


@st.composite
def parts_of_rows(draw):
    """Documents, what is visible in them, and the columns that are here."""
    rows, visibility = draw(rows_of_documents()), draw(what_may_be_visible())
    copies = visibility.window is None and draw(st.booleans())
    documents = both_copies(rows) if copies else Documents.from_position_ids(positions(*rows))
    size = documents.position_ids.shape[1]
    if draw(st.booleans()):
        cuts = sorted(draw(st.sets(st.integers(0, size), min_size=2, max_size=2)))
        return documents, visibility, slice(*cuts)
    chosen = draw(st.sets(st.integers(0, size - 1), min_size=1))
    return documents, visibility, torch.tensor(sorted(chosen))


def columns_of(documents, columns) -> torch.Tensor:
    """The columns as places in the flattened rows."""
    return torch.arange(documents.position_ids.numel()).view_as(documents.position_ids)[:, columns].flatten()


@given(part=parts_of_rows())
def test_segments_are_the_queries_that_are_here_in_their_order(part):
    documents, _, columns = part
    found = segments(documents, columns)
    places = [place for segment in found for place in range(segment.queries.start, segment.queries.stop)]
    assert places == columns_of(documents, columns).tolist()
    of_token = documents.tokens()
    for segment in found:
        whole = slice(segment.start, segment.start + segment.length)
        assert len(of_token.document[whole].unique()) == 1
        assert segment.start <= segment.queries.start < segment.queries.stop <= whole.stop
        assert torch.equal(of_token.position[whole], torch.arange(segment.length))
        assert not of_token.noised[segment.clean]
        assert of_token.document[segment.clean] == of_token.document[segment.start]


@given(part=parts_of_rows())
def test_keys_of_segments_are_those_that_a_query_sees(part):
    documents, visibility, columns = part
    tokens, found = documents.tokens(), segments(documents, columns)
    seen = visibility.sees(tokens.at((slice(None), None)), tokens)
    for segment in found:
        keys = [place for keys in keys_of(segment, visibility) for place in range(keys.start, keys.stop)]
        assert keys == seen[segment.queries].any(0).nonzero().flatten().tolist()
    assert torch.equal(seen_keys(found, visibility, len(seen)), seen[columns_of(documents, columns)].any(0))


@given(
    part=parts_of_rows(),
    heads=st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    block_tokens=st.sampled_from([1, 8, 128]),
)
def test_values_and_gradients_equal_the_formula(part, heads, block_tokens):
    documents, visibility, columns = part
    q, k, v = qkv(*documents.position_ids.shape, *heads)
    here = columns_of(documents, columns)
    expected = formula(q, k, v, documents, visibility).flatten(0, 1)[here]
    seen = seen_keys(segments(documents, columns), visibility, documents.position_ids.numel())
    with mock.patch.object(block_attention, "BLOCK_TOKENS", block_tokens):
        blocks = among(plan_blocks(documents, visibility, columns), seen)
    some = q.flatten(0, 1)[here], k.flatten(0, 1)[seen], v.flatten(0, 1)[seen]
    found = attend_planned(*some, blocks)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    upstream = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected_grads = torch.autograd.grad(expected, (q, k, v), upstream)
    grads = torch.autograd.grad(found, (q, k, v), upstream)
    torch.testing.assert_close(grads, expected_grads, atol=1e-11, rtol=1e-11)


def varlen_by_definition(q, k, v, call, visibility):
    """What one call of the kernel computes: the last query of each segment stands at its last key."""
    out, first, first_key = [], call.queries.start, call.keys.start
    for queries, keys in zip(call.query_lengths, call.key_lengths, strict=True):
        place = torch.arange(queries).unsqueeze(1) + keys - queries
        other = torch.arange(keys)
        seen = torch.ones(queries, keys, dtype=torch.bool)
        if visibility.span == 1:
            seen = (other <= place) & (place - other < (visibility.window or keys))
        some = q[first : first + queries], *(x[first_key : first_key + keys] for x in (k, v))
        of_q, of_k, of_v = (x.transpose(0, 1) for x in some)
        scores = (of_q @ of_k.transpose(1, 2) / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
        out.append((scores.softmax(-1) @ of_v).transpose(0, 1))
        first, first_key = first + queries, first_key + keys
    assert (first, first_key) == (call.queries.stop, call.keys.stop)
    return torch.cat(out)


@given(part=parts_of_rows())
def test_calls_of_the_variable_length_kernel_equal_the_formula(part):
    documents, visibility, columns = part
    assume(visibility.span in (1, None) and documents.copies == 1)
    q, k, v = qkv(*documents.position_ids.shape, heads=2, kv_heads=2)
    here, found = columns_of(documents, columns), segments(documents, columns)
    seen = seen_keys(found, visibility, documents.position_ids.numel())
    expected = formula(q, k, v, documents, visibility).flatten(0, 1)[here]
    flat = q.flatten(0, 1)[here], k.flatten(0, 1)[seen], v.flatten(0, 1)[seen]
    calls = plan_varlen(RowPart(found, seen), visibility)
    torch.testing.assert_close(torch.cat([varlen_by_definition(*flat, call, visibility) for call in calls]), expected)


def test_neighbouring_documents_share_a_call_of_the_kernel():
    documents = Documents.from_position_ids(positions([6, 4, 6]))
    for columns, expected in (([3, 4, 5, 6, 7, 8], [[3, 3]]), ([0, 1, 6, 7, 10, 11], [[2, 2, 2]])):
        found = segments(documents, torch.tensor(columns))
        calls = plan_varlen(RowPart(found, seen_keys(found, Visibility(), 16)), Visibility())
        assert [call.query_lengths for call in calls] == expected
    found = segments(documents, torch.tensor([1, 2, 5]))  # two stretches of one document
    calls = plan_varlen(RowPart(found, seen_keys(found, Visibility(), 16)), Visibility())
    assert [(call.query_lengths, call.key_lengths) for call in calls] == [([2], [3]), ([1], [6])]


@examples(30)
@given(part=parts_of_rows())
def test_flex_attention_of_a_part_equals_the_formula(part):
    documents, visibility, columns = part
    q, k, v = (x.detach().float() for x in qkv(*documents.position_ids.shape, width=16))
    here, found = columns_of(documents, columns), segments(documents, columns)
    assume(len(here) > 0)
    seen = seen_keys(found, visibility, documents.position_ids.numel())
    flat = q.flatten(0, 1)[here], k.flatten(0, 1)[seen], v.flatten(0, 1)[seen]
    result = attend_flex_part(*flat, documents, visibility, RowPart(found, seen))
    expected = formula(q, k, v, documents, visibility).flatten(0, 1)[here]
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
