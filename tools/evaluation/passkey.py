"""Can the model use what it read long ago? Retrieval of a pass key by length and depth (Mohtashami and Jaggi 2023).

A sentence with a random number is hidden in text of the evaluation data, and the end of the text asks for it:

    <bos> introduction, filler up to the depth, sentence with the key, rest of the filler, question | answer

Three figures for each length and depth, because models that are too small to answer may still have noticed the key:
`exact_match`, greedy decoding writes the key and no further digit; `forced_choice`, the key is more likely as the answer
than each of the other candidates; `nll_drop`, by how many nats the sentence lowers the cross-entropy of the key, against
the same text with filler in its place. Texts and keys depend on the seed, the length and the number of the trial only:
all depths hide the same key in the same text.
"""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

import numpy as np
import torch

from console.progress import Progress
from data_prep.tokenizer import Tokenizer
from model.generation import continuation_losses, generate
from model.llama import Llama
from storage.shards import ShardedDataset
from tools.evaluation.passkey_phrases import PHRASES

LANGUAGE_SAMPLE_TOKENS = 1024
MIN_CHINESE_SHARE = 0.1  # of the characters of Chinese text with formulas, names and spaces
DIGITS = 5
MIN_FILLER_TOKENS = 16


class Trial(NamedTuple):
    """Token ids; `filler` is long enough to stand for the needle too."""

    introduction: list[int]
    filler: list[int]
    needle: list[int]
    question: list[int]
    answers: list[list[int]]
    """Of all candidates, the key's first; each what follows the question."""

    def text(self, depth: float | None) -> list[int]:
        """With the needle after that share of the filler, or without it in a text of the same length."""
        if depth is None:
            return [*self.introduction, *self.filler, *self.question]
        around = len(self.filler) - len(self.needle)
        at = round(depth * around)
        return [*self.introduction, *self.filler[:at], *self.needle, *self.filler[at:around], *self.question]


class Filler:
    """Text of the first `max_samples` rows of every source, without control tokens, from random rows."""

    def __init__(self, dataset: ShardedDataset, max_samples: int | None) -> None:
        self.dataset = dataset
        counts = [min(dataset.rows_per_source[name], max_samples or len(dataset)) for name in dataset.sources]
        self.bounds = np.cumsum([0, *counts])
        self.control = dataset.manifest.tokenizer.control_ids

    def draw(self, generator: np.random.Generator, tokens: int) -> list[int]:
        """So many of its tokens, from as many rows as they take."""
        ids: list[int] = []
        while len(ids) < tokens:
            number = int(generator.integers(self.bounds[-1]))
            source = int(np.searchsorted(self.bounds, number, side="right")) - 1
            row = self.dataset.row(self.dataset.sources[source], number - int(self.bounds[source]))
            text = row.ids[: row.seg_len.sum()]
            ids += text[~np.isin(text, self.control)].tolist()
        return ids[:tokens]


class Passkeys:
    """The trials of one data set. `language` is one of PHRASES, or "auto" for that of the data."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        dataset: ShardedDataset,
        language: str = "auto",
        candidates: int = 10,
        seed: int = 0,
        max_samples: int | None = None,
    ) -> None:
        self.tokenizer, self.candidates, self.seed = tokenizer, candidates, seed
        self.filler = Filler(dataset, max_samples)
        if language == "auto":
            sample = self.filler.draw(np.random.default_rng(seed), LANGUAGE_SAMPLE_TOKENS)
            language = language_of(tokenizer.decode(sample))
        self.language = language

    @property
    def shortest(self) -> int:
        """Tokens of the shortest text that still has some filler."""
        introduction, needle, question, answers = self._encoded(np.random.default_rng(self.seed))
        return len(introduction) + len(needle) + len(question) + len(answers[0]) + MIN_FILLER_TOKENS

    def trial(self, length: int, number: int) -> Trial:
        """A trial of which text and longest answer are `length` tokens."""
        generator = np.random.default_rng((self.seed, length, number))
        introduction, needle, question, answers = self._encoded(generator)
        room = length - len(introduction) - len(question) - max(map(len, answers))
        assert room > len(needle), "lengths start at `shortest`"
        return Trial(introduction, self.filler.draw(generator, room), needle, question, answers)

    def _encoded(self, generator: np.random.Generator) -> tuple[list[int], list[int], list[int], list[list[int]]]:
        """Introduction, needle, question and answers of random keys."""
        keys = 10 ** (DIGITS - 1) + generator.choice(9 * 10 ** (DIGITS - 1), self.candidates, replace=False)
        phrases = PHRASES[self.language]
        needle, answered = phrases.needle.format(key=keys[0]), [phrases.answer.format(key=key) for key in keys]
        texts = [phrases.introduction, needle, phrases.question, *(phrases.question + text for text in answered)]
        introduction, needle, question, *asked = (ids.tolist() for ids in self.tokenizer.encode_batch(texts))
        # a tokenizer may join the end of the question with the answer: the text stops where all of them still agree
        shared = next((i for i, ids in enumerate(zip(question, *asked, strict=False)) if len(set(ids)) > 1), None)
        question = question[:shared]
        if self.tokenizer.bos_id is not None:
            introduction.insert(0, self.tokenizer.bos_id)
        return introduction, needle, question, [ids[len(question) :] for ids in asked]

    def is_answer(self, trial: Trial, tokens: list[int]) -> bool:
        """Whether the tokens after the question spell the key, and then no further digit."""
        expected = self.tokenizer.decode([*trial.question, *trial.answers[0]])
        text = self.tokenizer.decode([*trial.question, *tokens])
        return text.startswith(expected) and not text[len(expected) :][:1].isdigit()


def language_of(text: str) -> str:
    """The key of PHRASES for a text: Chinese where a tenth of its characters are, else English."""
    return "zh" if sum("\u4e00" <= c <= "\u9fff" for c in text) > MIN_CHINESE_SHARE * len(text) else "en"


def default_lengths(row_tokens: int) -> list[int]:
    """A quarter, half, and the whole of a row."""
    return sorted({row_tokens // part for part in (4, 2, 1)})


def passkey(model: Llama, passkeys: Passkeys, lengths: list[int], depths: int, trials: int) -> dict[str, Any]:
    """The three figures of every length and of `depths` depths from 0 to 1, over `trials` trials each; JSON-able."""
    shares = np.linspace(0, 1, depths).round(4).tolist()
    cells = []
    with Progress("pass keys", sum(lengths) * trials * (1 + 2 * depths)) as progress:
        for length in lengths:
            found: dict[float, list[tuple[bool, bool, float]]] = {depth: [] for depth in shares}
            for number in range(trials):
                trial = passkeys.trial(length, number)
                (without,) = continuation_losses(model, _prompt(model, trial.text(None)), trial.answers[:1])
                progress.advance(length, length)
                for depth in shares:
                    found[depth].append(_outcome(model, passkeys, trial, depth, without))
                    progress.advance(2 * length, 2 * length)
            cells += [{"length": length, "depth": depth} | _cell(outcomes) for depth, outcomes in found.items()]
    settings = {"language": passkeys.language, "candidates": passkeys.candidates, "seed": passkeys.seed}
    return settings | {"trials": trials, "cells": cells}


def _outcome(model: Llama, passkeys: Passkeys, trial: Trial, depth: float, without: float) -> tuple[bool, bool, float]:
    prompt = _prompt(model, trial.text(depth))
    key, *others = continuation_losses(model, prompt, trial.answers)
    one_more = len(trial.answers[0]) + 1
    written = list(generate(model, prompt, one_more, temperature=0, eos_id=passkeys.tokenizer.eos_id))
    return passkeys.is_answer(trial, written), all(key < other for other in others), without - key


def _cell(outcomes: list[tuple[bool, bool, float]]) -> dict[str, Any]:
    exact, chosen, drops = zip(*outcomes, strict=True)
    return {
        "exact_match": statistics.fmean(exact),
        "forced_choice": statistics.fmean(chosen),
        "nll_drop": statistics.fmean(drops),
        "nll_drop_standard_error": statistics.stdev(drops) / len(drops) ** 0.5 if len(drops) > 1 else None,
    }


def _prompt(model: Llama, ids: list[int]) -> torch.Tensor:
    return torch.tensor(ids, device=model.embed_tokens.weight.device)
