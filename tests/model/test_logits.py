"""The largest logit is that of the definition, of whole rows and of parts of them."""

from unittest import mock

import pytest
import torch

from model import logits
from model.documents import Documents
from model.logits import largest_logit
from model.part_attention import RowPart
from model.segments import seen_keys, segments
from model.visibility import Visibility

ROWS, TOKENS, HEADS, KEY_HEADS, WIDTH = 2, 48, 4, 2, 8
POSITIONS = torch.cat([torch.arange(n) for n in (48, 7, 1, 30, 10)]).view(ROWS, TOKENS)
OF_TWO_COPIES = torch.cat([torch.arange(n) for n in (24, 24, 7, 17, 7, 17)]).view(ROWS, TOKENS)


CHUNKED = Visibility(span=6)


@pytest.mark.parametrize(
    ("visibility", "copies"),
    [(Visibility(), 1), (Visibility(window=5), 1), (CHUNKED, 1), (CHUNKED, 2), (Visibility(span=None), 1)],
)
@pytest.mark.parametrize("most", [1024, 16, 5])
def test_it_is_the_largest_of_all_visible_scores(visibility, copies, most):
    """Of every third, or tenth, query where there are too many; a rank that has some columns finds the largest of theirs."""
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(ROWS, TOKENS, HEADS, WIDTH, generator=draw)
    k = torch.randn(ROWS, TOKENS, KEY_HEADS, WIDTH, generator=draw)
    documents = Documents.from_position_ids(OF_TWO_COPIES if copies == 2 else POSITIONS, copies=copies)
    tokens = documents.tokens()
    sees = visibility.sees(tokens.at((slice(None), None)), tokens).view(ROWS, TOKENS, ROWS, TOKENS)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(HEADS // KEY_HEADS, 2)) / WIDTH**0.5
    with mock.patch.object(logits, "QUERIES", most), mock.patch.object(logits, "SCORES", 500):
        for row in range(ROWS):
            chosen = torch.arange(TOKENS) % -(-TOKENS // most) == 0
            visible = sees[row, :, row] & chosen[:, None]
            expected = scores[row][:, visible].max()
            torch.testing.assert_close(largest_logit(q, k, documents, visibility, row, None), expected)
            found = []
            for columns in (torch.arange(TOKENS)[1::3], torch.arange(TOKENS)[torch.arange(TOKENS) % 3 != 1]):
                here = documents.part(columns)
                part = RowPart(
                    segments(documents, columns), seen_keys(segments(documents, columns), visibility, ROWS * TOKENS)
                )
                seen = k.flatten(0, 1)[part.seen]
                found.append(largest_logit(q[:, columns], seen, here, visibility, row, part))
            torch.testing.assert_close(torch.stack(found).max(), expected)
