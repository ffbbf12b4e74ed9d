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
        """`targets` become the sides of pairs, `num_targets` their number; documents begin a text of their own.

        A pair is a conversation of which both sides have tokens here, control tokens apart. What answers begins with its first
        target, or with the tokenizer's beginning right before it.
        """
        ids, positions, targets = (batch[key].numpy() for key in ("input_ids", "position_ids", "targets"))
        positions, sides, number = positions.copy(), np.full_like(targets, NO_TARGET), 0
        content = ~np.isin(ids, self.control)
        for row in range(len(ids)):
            begins = [*np.flatnonzero(positions[row] == 0).tolist(), ids.shape[1]]
            in_row = 0
            for begin, end in pairwise(begins):
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
                    for side, places in enumerate(parts):
                        sides[row, places] = 2 * in_row + side
                    in_row += 1
            number += in_row
        made = {"position_ids": torch.from_numpy(positions), "targets": torch.from_numpy(sides)}
        return batch | made | {"num_targets": number}  # type: ignore[return-value]
