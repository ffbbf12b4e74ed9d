"""Masks of dropout: as often 0 as they should be, independent, and the same for a token wherever it is computed."""

import pytest
import torch

from model.documents import Documents
from model.dropout import dropped

ROWS, TOKENS, FEATURES = 4, 64, 96


def masks(share=0.25, place=3, seeds=(5, 6, 7, 2**62), columns=slice(None), first=0, features=FEATURES) -> torch.Tensor:
    """Where numbers stay, bool [B, T, D]."""
    documents = Documents.whole_rows(len(seeds), TOKENS).part(columns)
    documents.seeds = torch.tensor(seeds)
    x = torch.ones(len(seeds), documents.position_ids.shape[1], features)
    out = dropped(x, documents, share, place, first)
    kept = out != 0
    torch.testing.assert_close(out, kept / (1 - share))
    return kept


@pytest.mark.parametrize("share", [0.05, 0.25, 0.9])
def test_the_share_is_that_of_every_row_token_feature_and_map(share):
    found = torch.stack([masks(share, place, tuple(range(40, 60))) for place in range(12)]).double()
    for dimensions in [(0, 1, 2, 3), (1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2)]:
        counted = found.mean(dimensions)
        draws = found.numel() / counted.numel()
        deviation = (share * (1 - share) / draws) ** 0.5
        assert (counted - (1 - share)).abs().max() < 5 * deviation, dimensions


def test_masks_of_neighbours_say_nothing_of_each_other():
    """Of rows, tokens, features and maps: how many of both stay, against independence, to five standard deviations."""
    share, found = 0.5, torch.stack([masks(0.5, place, tuple(range(24))) for place in range(4)])
    for dimension in range(4):
        for step in (1, 2, 3):
            both = (
                found.narrow(dimension, 0, found.shape[dimension] - step)
                & found.narrow(dimension, step, found.shape[dimension] - step)
            ).double()
            assert abs(both.mean() - share**2) < 5 * (share**2 * (1 - share**2) / both.numel()) ** 0.5


def test_parts_of_rows_and_of_features_have_the_masks_of_the_whole():
    whole = masks()
    columns = torch.tensor([0, 3, 9, 63])
    torch.testing.assert_close(masks(columns=columns), whole[:, columns])
    torch.testing.assert_close(masks(columns=slice(16, 32)), whole[:, 16:32])
    torch.testing.assert_close(masks(first=40, features=20), whole[..., 40:60])
    torch.testing.assert_close(masks(seeds=(6,)), whole[1:2])


def test_without_seeds_nothing_is_dropped():
    x = torch.randn(2, 8, 4)
    assert dropped(x, Documents.whole_rows(2, 8), 0.5, 0) is x
    documents = Documents.whole_rows(2, 8)
    documents.seeds = torch.tensor([1, 2])
    assert dropped(x, documents, 0.0, 0) is x
