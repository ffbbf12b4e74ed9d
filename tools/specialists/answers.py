"""Adapters that learn to answer, one for each kind of question, trained in one job with loss on the answers only."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from console.progress import say
from data_prep.tokenizer import Tokenizer
from model.generation import generate
from model.llama import Llama
from tools.specialists.metrics import exact_match, word_f1
from tools.specialists.questions import QUESTIONS, Question, read_questions, split, write_questions
from tools.specialists.results import Figure, Results
from tools.specialists.trainings import ARROW, RECIPES, Training, Workshop
from tools.trained import open_trained

LONGEST_ANSWER = 48
"""Tokens."""
RANK = 16


def overlap(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """chrF and BLEU of sacrebleu, of 100."""
    from sacrebleu import corpus_bleu, corpus_chrf

    chrf, bleu = corpus_chrf(answers, [references]), corpus_bleu(answers, [references])
    return {"chrF": chrf.score, "BLEU": bleu.score}


def shared_words(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """ROUGE-1 and ROUGE-L of rouge-score (F), of 100."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=False)
    found = [scorer.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    return {
        name: 100 * sum(scores[key].fmeasure for scores in found) / len(found)
        for name, key in (("ROUGE-1", "rouge1"), ("ROUGE-L", "rougeL"))
    }


def right_words(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Exact matches and F1 of the words, of 100."""
    pairs = list(zip(answers, references, strict=True))
    return {
        name: 100 * sum(measure(*pair) for pair in pairs) / len(pairs)
        for name, measure in (("exact match", exact_match), ("F1", word_f1))
    }


MEASURES: dict[str, Callable[[Sequence[str], Sequence[str]], dict[str, float]]] = {
    "translation": overlap,
    "summarisation": shared_words,
    "answering": right_words,
}


def compare(workshop: Workshop, base: Path, names: Sequence[str]) -> dict[str, Results]:
    """A table for each of the kinds of questions."""
    settings, held_out, files = workshop.settings, {}, []
    for name in names:
        files.append(workshop.work / "questions" / f"{name}.jsonl")
        held_out[name] = prepared(workshop, name, files[-1])
    together = "-".join(names)
    data = workshop.data(together, files, "--prompt-field", "prompt", "--response-field", "response", *FOR_VALIDATION)
    adapters = {"names": list(names), "r": RANK, "lora_alpha": 2 * RANK}
    seeds = range(1, settings.seeds + 1)
    wanted = {
        f"{together}-{seed}": Training(data, RECIPES / "adapters.yaml", settings.answer_steps, adapters, base, seed)
        for seed in seeds
    }
    runs = workshop.trainings(wanted)
    return {name: table(name, held_out[name], runs) for name in names}


FOR_VALIDATION = "--validation-fraction", 0.01


def prepared(workshop: Workshop, name: str, file: Path) -> list[Question]:
    """Writes what is learned from and returns what is asked at the end."""
    asked = file.with_suffix(".held_out.jsonl")
    if not asked.exists():
        file.parent.mkdir(exist_ok=True)
        learned, held_out = split(list(QUESTIONS[name](workshop.work)))
        held_out.sort(key=lambda question: zlib.crc32(question.prompt.encode()))
        write_questions(learned, file)
        write_questions(held_out[: workshop.settings.questions], asked)
    return read_questions(asked)


def table(name: str, questions: Sequence[Question], runs: Sequence[Path]) -> Results:
    references = [question.response for question in questions]
    rows = {
        "copy": [MEASURES[name]([question.copied for question in questions], references)],
        "base": [],
        "adapter": [],
    }
    for run in runs:
        for way, adapter in (("base", "base"), ("adapter", name)):
            if way == "base" and rows["base"]:
                continue  # the same for all seeds
            trained = open_trained(str(run), None, None, "float32", adapter)
            say(f"{name}: {len(questions)} answers of {run.name}, {way}")
            rows[way].append(MEASURES[name](answers(trained.model, trained.tokenizer, questions), references))
    columns = list(rows["copy"][0])
    figures = {way: {c: Figure([found[c] for found in of_seeds]) for c in columns} for way, of_seeds in rows.items()}
    return Results(f"{name}: {len(questions)} held-out questions", columns, figures, 1)


def answers(model: Llama, tokenizer: Tokenizer, questions: Sequence[Question]) -> list[str]:
    """The likeliest next tokens after each prompt, until the end token or the first line's."""
    found = []
    for question in questions:
        (ids,) = tokenizer.encode_batch([question.prompt + ARROW])
        start = torch.tensor(ids.tolist(), device=model.embed_tokens.weight.device)
        written = list(generate(model, start, LONGEST_ANSWER, temperature=0, eos_id=tokenizer.eos_id))
        text = tokenizer.decode([token for token in written if token < tokenizer.vocab_size])
        found.append(text.strip().split("\n")[0])
    return found
