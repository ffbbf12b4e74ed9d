"""Conversations to ids, and which of them carry loss.

A conversation is stored as `apply_chat_template` of `transformers` tokenizes it, with EOS behind it where the template ends
without: what stands before it is the template's to say, BOS too. A token carries loss if it stands for a character that the
assistant writes, and the EOS that is added if the last token before it (white space aside) does.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from data_prep.records import Rendered
from data_prep.targets import Spans, spans_of
from data_prep.tokenizer import Tokenizer


class EncodedChats(NamedTuple):
    ids: np.ndarray  # dtype of the store, [tokens of all]
    lengths: np.ndarray  # int64 [conversations]
    targets: Spans
    target_bytes: list[int]


class ChatEncoder:
    """Encodes conversations as stored."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        vocabulary = tokenizer.vocabulary()
        self._control = {token: vocabulary[token] for token in tokenizer.control_strings if token}
        longest_first = sorted(self._control, key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def encode(self, chats: Sequence[Rendered]) -> EncodedChats:
        """Ids as stored, their targets, and the bytes of the text that these stand for."""
        parts, masks, sizes, eos_id = [], [], [], self.tokenizer.eos_id
        for chat in chats:
            ids, offsets = self.encode_text(chat)
            mask = _carries_loss(offsets, chat)
            last = _last_but_white_space(offsets, chat.text)
            if last < 0 or ids[last] != eos_id:
                ids, mask = np.append(ids, eos_id), np.append(mask, last >= 0 and mask[last])
            parts.append(ids.astype(self.tokenizer.dtype))
            masks.append(mask)
            sizes.append(sum(len(chat.text[begin:end].encode()) for begin, end in chat.targets))
        return EncodedChats(np.concatenate(parts), np.array([len(ids) for ids in parts]), spans_of(masks), sizes)

    def encode_text(self, chat: Rendered) -> tuple[np.ndarray, np.ndarray]:
        """Ids of a conversation, int64 [n], and the characters that each stands for, int64 [n, 2]."""
        if self.tokenizer.type == "huggingface" and not chat.literal:
            return self.tokenizer.encode_with_offsets(chat.text, control=True)
        found = (match.span() for match in self._spelled.finditer(chat.text))
        edges = [0, *(edge for span in found if span not in chat.literal for edge in span), len(chat.text)]
        pieces: list[tuple[np.ndarray, np.ndarray]] = []
        for number, (begin, end) in enumerate(pairwise(edges)):
            text = chat.text[begin:end]
            if number % 2:
                pieces.append((np.array([self._control[text]]), np.array([(begin, end)])))
            elif text:
                ids, offsets = self.tokenizer.encode_with_offsets(text)
                pieces.append((ids, offsets + begin))
        ids, offsets = (np.concatenate(columns) for columns in zip(*pieces, strict=True))
        return ids, offsets


def _carries_loss(offsets: np.ndarray, chat: Rendered) -> np.ndarray:
    """Which tokens stand for a character of the targets, bool [n]; one that stands for none counts with the one behind it."""
    inside = np.zeros(len(chat.text) + 2, np.int64)
    for begin, end in chat.targets:
        inside[begin:end] = 1
    before = np.concatenate([[0], np.cumsum(inside)])
    first = offsets[:, 0]
    return before[np.maximum(offsets[:, 1], first + 1)] > before[first]


def _last_but_white_space(offsets: np.ndarray, text: str) -> int:
    """The last token that stands for something else; -1: there is none."""
    return next((i for i in reversed(range(len(offsets))) if text[slice(*offsets[i])].strip()), -1)
