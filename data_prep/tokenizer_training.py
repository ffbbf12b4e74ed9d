"""Training a SentencePiece model in LLaMA's manner; the command is `python -m data_prep.tokenizer train`."""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from console.command import CommandParser, DefaultsInHelp
from console.progress import Progress, say
from data_prep.documents import read_unit
from data_prep.records import Problems
from data_prep.sources import hash64, parse_sources, plan_units
from data_prep.summary import by_reason, left_out_words
from data_prep.tokenizer_files import MODEL_FILE
from storage.atomic import write_atomically

CHARACTER_COVERAGE = 0.99995
SENTENCE_BYTES = 4096


def train(
    texts: Iterable[str], vocab_size: int, threads: int = 1, character_coverage: float = CHARACTER_COVERAGE
) -> bytes:
    """Train a SentencePiece BPE model in LLaMA's manner and return its serialized form.

    Byte fallback, digits one by one, no normalisation, white space kept; ids: unk 0, bos 1, eos 2, pad 3, mask 4. Characters
    beyond the most frequent ones, which make up `character_coverage` of the text, are left to the bytes.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            character_coverage=character_coverage,
            max_sentence_length=SENTENCE_BYTES,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            control_symbols=["<mask>"],
            num_threads=threads,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(_training_problem(str(error), vocab_size)) from None
    return model.getvalue()


def _training_problem(message: str, vocab_size: int) -> str:
    if "Vocabulary size too high" in message or "Vocabulary size is smaller" in message:
        return f"--vocab-size {vocab_size} does not fit this text: " + message.split("] ")[-1].strip().replace(
            "decrease character_coverage with --character_coverage option", "decrease --character-coverage"
        )
    if "sentences_.empty()" in message or "!sentences_" in message:
        return "the input holds no text to train a tokenizer on"
    return f"the tokenizer could not be trained: {message}"


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Lines, long ones cut (at spaces where there are some): the trainer ignores whatever exceeds SENTENCE_BYTES."""
    for text in texts:
        for line in text.split("\n"):
            while len(line) * 4 > SENTENCE_BYTES and len(line.encode()) > SENTENCE_BYTES:
                limit = SENTENCE_BYTES // 4
                cut = line.rfind(" ", 1, limit)
                cut = cut if cut > 0 else limit
                yield line[:cut]
                line = line[cut:]
            if line and not line.isspace():
                yield line


def main() -> None:
    parser = CommandParser(prog="python -m data_prep.tokenizer", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    options = commands.add_parser("train", formatter_class=DefaultsInHelp)
    options.add_argument("--input", nargs="+", required=True, help="documents: files, folders or globs")
    options.add_argument("--vocab-size", type=int, default=32000, help="entries, control and byte tokens included")
    coverage_help = "share of the text's characters that get entries; the rare rest is written as bytes"
    options.add_argument("--character-coverage", type=float, default=CHARACTER_COVERAGE, help=coverage_help)
    options.add_argument("--output", type=Path, required=True, help="folder for tokenizer.model")
    options.add_argument("--text-field", default="text", help="field or column that holds the text")
    options.add_argument("--on-error", choices=("fail", "skip"), default="fail", help="what to do with bad records")
    options.add_argument("--sample-megabytes", type=int, default=100, help="train on about this much text at most")
    options.add_argument("--workers", type=int, default=1, help="threads of the trainer")
    arguments = parser.parse_args()
    if not 0 < arguments.character_coverage <= 1:
        raise ValueError(
            f"--character-coverage {arguments.character_coverage}: a share of the text, above 0 and up to 1"
        )

    inputs = parse_sources(arguments.input, [])
    units, files, left_out = plan_units(inputs, on_error=arguments.on_error)
    share = min(1.0, arguments.sample_megabytes * 1e6 / max(1, sum(file.size for file in files)))
    problems = Problems(arguments.on_error)
    sampled = 0

    def texts() -> Iterator[str]:
        nonlocal sampled
        with Progress("reading", sum(unit.size for unit in units)) as progress:
            for unit in units:
                for document in read_unit(unit, files, arguments.text_field, None, problems):
                    if hash64(document.key) < share * 2**64:
                        sampled += len(document.text)
                        yield document.text
                progress.advance(unit.size)

    say(f"training a tokenizer of {arguments.vocab_size:,} entries on {100 * share:.0f} % of {len(files):,} files")
    model = train(texts(), arguments.vocab_size, arguments.workers, arguments.character_coverage)
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_atomically(arguments.output / MODEL_FILE, model)
    for words in left_out_words(by_reason([*left_out, *problems.left_out])):
        say(words)
    if problems.count:
        say(f"skipped {problems.count:,} bad records, the first: {problems.examples[0]}")
    say(f"wrote {arguments.output / MODEL_FILE} ({arguments.vocab_size:,} entries, {sampled:,} characters read)")
