"""What tools.data_report measures in the documents themselves: their lengths, what a token holds by script, samples to read."""

import unicodedata
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np

from data_prep.store import StoredDocuments, TokenStore
from data_prep.token_bytes import token_bytes
from data_prep.tokenizer import Tokenizer

MEASURED_TOKENS = 1 << 21
"""Of each source, in documents (beginnings of long ones) that lie evenly over it."""
LONGEST_MEASURED = 1 << 16
SAMPLES, SAMPLE_CHARACTERS, SAMPLE_TOKENS = 3, 700, 2000
OTHERS = ["white space", "punctuation and symbols", "digits"]
"""What is of no script; of a token with both, the later in the list and letters count."""
SCRIPTS = {"CJK": "Han", "HIRAGANA": "Kana", "KATAKANA": "Kana", "HALFWIDTH": "Kana", "IDEOGRAPHIC": "Han"}
CODE_ENDS = tuple("{}();:,[]>")
CODE_SYMBOLS = frozenset("{}()[];=<>_&|#$*/+\"'\\")


class Efficiency(NamedTuple):
    """Sums over the tokens that are of a script."""

    tokens: int = 0
    bytes: int = 0
    characters: int = 0
    fallback: int = 0
    """Tokens that hold a single byte of a character."""


class SampleText(NamedTuple):
    key: str
    text: str
    tokens: int
    """Of the whole document."""
    is_code: bool
    is_whole: bool


def length_classes(lengths: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Least and most tokens, documents and their tokens of each power of two that there is a document between."""
    if not len(lengths):
        return []
    power = np.floor(np.log2(np.maximum(lengths, 1))).astype(np.int64)
    documents, tokens = np.bincount(power), np.bincount(power, weights=lengths).astype(np.int64)
    least, most = int(power.min()), int(power.max())
    return [(1 << p, (2 << p) - 1, int(documents[p]), int(tokens[p])) for p in range(least, most + 1)]


class Reader:
    """Reads documents of a store as bytes and as text."""

    def __init__(self, store: TokenStore, tokenizer: Tokenizer) -> None:
        self.store, self.tokenizer = store, tokenizer
        self.pieces = token_bytes(tokenizer)
        self.sizes = np.array([len(piece) for piece in self.pieces], np.int64)
        fallback = np.zeros(len(self.pieces), np.bool_)
        fallback[tokenizer.fallback_ids] = True
        self.fallback = fallback

    def by_script(self, documents: StoredDocuments) -> dict[str, Efficiency]:
        """Of tokens in documents that lie evenly over all, by script, the one with most tokens first."""
        sums: dict[str, np.ndarray] = {}
        for ids in self._measured(documents):
            ids = ids[self.sizes[ids] > 0].astype(np.int64)
            if not len(ids):
                continue
            sizes, data = self.sizes[ids], b"".join([self.pieces[i] for i in ids.tolist()])
            starts = np.cumsum(sizes) - sizes
            characters = (np.frombuffer(data, np.uint8) & 0xC0) != 0x80
            names, classes = _classes(data)
            of_token = np.maximum.reduceat(classes, starts)
            columns = np.ones(len(ids), np.int64), sizes, np.add.reduceat(characters, starts), self.fallback[ids]
            for number, name in enumerate(names):
                mine = of_token == number
                if mine.any():
                    added = np.array([int(column[mine].sum()) for column in columns])
                    sums[name] = sums.get(name, np.zeros(4, np.int64)) + added
        found = {name: Efficiency(*row.tolist()) for name, row in sums.items()}
        return dict(sorted(found.items(), key=lambda item: -item[1].tokens))

    def _measured(self, documents: StoredDocuments) -> Iterator[np.ndarray]:
        total = int(np.minimum(documents.length, LONGEST_MEASURED).sum())
        step = max(1, -(-total // MEASURED_TOKENS))
        for i in range(step // 2, len(documents), step):
            yield documents.tokens(i)[:LONGEST_MEASURED]

    def samples(self, documents: StoredDocuments) -> list[SampleText]:
        """The beginnings of documents that lie evenly over all."""
        count = min(SAMPLES, len(documents))
        return [self._sample(documents, (2 * n + 1) * len(documents) // (2 * count)) for n in range(count)]

    def _sample(self, documents: StoredDocuments, i: int) -> SampleText:
        ids = documents.tokens(i)
        data = b"".join([self.pieces[token] for token in ids[:SAMPLE_TOKENS].tolist()])
        text = data.decode(errors="replace").lstrip(" ")
        if len(ids) > SAMPLE_TOKENS:
            text = text.rstrip("\ufffd")
        shown = "".join(_shown(character) for character in text[:SAMPLE_CHARACTERS])
        whole = len(ids) <= SAMPLE_TOKENS and len(text) <= SAMPLE_CHARACTERS
        return SampleText(documents.key(i), shown, len(ids), looks_like_code(shown), whole)


def looks_like_code(text: str) -> bool:
    """Whether lines look like those of a program: short, of many symbols, indented or ending as statements do."""
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) < 3:
        return False
    formed = sum(line.startswith(("    ", "\t", "  ")) or line.rstrip().endswith(CODE_ENDS) for line in lines)
    symbols = sum(character in CODE_SYMBOLS for character in text)
    return formed > 0.4 * len(lines) and symbols / len(text) > 0.02


def _shown(character: str) -> str:
    """Control characters as the pictures that Unicode has for them."""
    return chr(0x2400 + ord(character)) if character < " " and character not in "\n\t" else character


def _classes(data: bytes) -> tuple[list[str], np.ndarray]:
    """The class of each byte, by its character, uint8 [bytes], and their names: of a token with several the highest counts."""
    points = np.frombuffer(data.decode("utf-8", "surrogateescape").encode("utf-32-le", "surrogatepass"), np.uint32)
    present, place = np.unique(points, return_inverse=True)
    of_point = [_script(int(point)) for point in present]
    names = [*OTHERS, *sorted({*of_point} - {*OTHERS})]
    widths = 1 + (present >= 0x80) + (present >= 0x800) + (present >= 0x10000)
    widths[(present >= 0xDC80) & (present <= 0xDCFF)] = 1  # bytes that are no text
    numbers = np.array([names.index(name) for name in of_point], np.uint8)
    return names, np.repeat(numbers[place], widths[place])


@cache
def _script(point: int) -> str:
    """By the character's category, and of letters and their marks by the first word of the name that Unicode gives them."""
    character = chr(point)
    kind = unicodedata.category(character)[0]
    if kind == "N":
        return "digits"
    if kind not in "LM":
        return "white space" if character.isspace() else "punctuation and symbols"
    word = unicodedata.name(character, "OTHER").split()[0].partition("-")[0]
    return "punctuation and symbols" if word in ("COMBINING", "VARIATION") else SCRIPTS.get(word, word.capitalize())
