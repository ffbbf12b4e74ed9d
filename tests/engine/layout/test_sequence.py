"""Attention by keys on real ranks equals that of one process, and sends what is seen and no more."""

import pytest
import torch

from model.attention import attend
from model.documents import Documents
from model.visibility import Visibility
from tests.engine.layout.exchanges import KV_HEADS, WIDTH, by_keys, tensors
from tests.engine.layout.test_deal import packed
from tests.model.tiny import positions

RANKS = 4
LONG, SHORT = [packed(32768, 1024, seed=0)], [[40, 24], [10, 3, 51]]


@pytest.mark.parametrize(
    ("rows", "visibility", "copies"),
    [
        (LONG, Visibility(), 1),
        (SHORT, Visibility(1, 7), 1),
        (SHORT, Visibility(None), 1),
        ([row + row for row in SHORT], Visibility(6), 2),
        ([[16] * 4], Visibility(), 1),  # nothing to send
    ],
    ids=["documents of 1k", "window", "bidirectional", "two copies", "divided between documents"],
)
def test_attention_by_keys_equals_one_process(on_ranks, rows, visibility, copies):
    position_ids = positions(*rows)
    documents = Documents.from_position_ids(position_ids, copies=copies)
    *inputs, upstream = tensors(*position_ids.shape)
    q, k, v = (x.requires_grad_() for x in inputs)
    out = attend(q, k, v, documents, visibility)
    expected = [out.detach(), *torch.autograd.grad(out, (q, k, v), upstream)]
    ranks = on_ranks(RANKS, by_keys, position_ids, visibility, copies)
    assert torch.equal(torch.cat([rank["columns"] for rank in ranks]).sort().values, torch.arange(q.shape[1]))
    for rank in ranks:
        for found, whole in zip(rank["values"], expected, strict=True):
            torch.testing.assert_close(found, whole[:, rank["columns"]], atol=1e-5, rtol=1e-5)
    tokens = documents.tokens() if rows is not LONG else None
    sent = {way: sum(rank["sent"][way] for rank in ranks) for way in ("forward", "backward")}
    assert sent["forward"] == sent["backward"]
    bytes_of_key = 2 * KV_HEADS * WIDTH * 4
    if tokens is None:
        assert 0 < sent["forward"] < 0.05 * (RANKS - 1) * q.shape[1] * bytes_of_key  # of what a gather sends
    else:
        seen = visibility.sees(tokens.at((slice(None), None)), tokens).view(*position_ids.shape, -1)
        away = 0
        for rank in ranks:
            wanted = seen[:, rank["columns"]].flatten(0, 1).any(0).view_as(position_ids)
            wanted[:, rank["columns"]] = False
            away += int(wanted.sum())
        assert sent["forward"] == away * bytes_of_key
