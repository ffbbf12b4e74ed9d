"""Rows of conversations as pairs of texts that do not see each other: what is asked, and what answers it."""

from itertools import pairwise

import numpy as np
import torch

from storage.manifest import Manifest
from training.batch import Batch
from training.objective import NO_TARGET


class PairedTexts:
    """Makes batches of next-token prediction over conversations into batches of pairs (see `model/contrast.py`)."""

    def __init__(self, manifest: Manifest) -> None:
        self.begin, self.control = manifest.tokenizer.bos_id, np.array(manifest.tokenizer.control_ids)

    def __call__(self, batch: Batch, samples: np.ndarray) -> Batch:
        """`targets` become the sides of pairs, `num_targets` their number; answers begin a text of their own.

        A pair is a conversation of which both sides have tokens here, control tokens apart. What answers begins with its first
        target, or with the tokenizer's beginning right before it.
        """
        ids, positions, targets = (batch[key].numpy() for key in ("input_ids", "position_ids", "targets"))
        positions, sides = positions.copy(), np.full_like(targets, NO_TARGET)
        pairs: list[tuple[int, int]] = []
        content = ~np.isin(ids, self.control)
        for row in range(len(ids)):
            begins = [*np.flatnonzero(positions[row] == 0).tolist(), ids.shape[1]]
            in_row = 0
            for place, (begin, end) in enumerate(pairwise(begins)):
                found = np.flatnonzero(targets[row, begin:end] != NO_TARGET)
                if not len(found):
                    continue
                at = begin + int(found[0])  # the token before the first target
                answer = at + (ids[row, at] != self.begin)
                parts = [
                    begin + np.flatnonzero(content[row, begin:answer]),
                    answer + np.flatnonzero(content[row, answer:end]),
                ]
                positions[row, answer:end] -= answer - begin
                if all(map(len, parts)):
                    for side, tokens in enumerate(parts):
                        sides[row, tokens] = 2 * in_row + side
                    pairs.append((row, place))
                    in_row += 1
        made = {"position_ids": torch.from_numpy(positions), "targets": torch.from_numpy(sides)}
        made["pairs"] = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
        return batch | made | {"num_targets": len(pairs)}  # type: ignore[return-value]
