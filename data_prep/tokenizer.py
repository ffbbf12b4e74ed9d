"""Tokenizers: any SentencePiece model or Hugging Face `tokenizer.json` behind one interface, and training a new one.

    python -m data_prep.tokenizer train --input DOCS... --vocab-size 32000 --output TOK

BOS and EOS mark document boundaries and are added by whoever stores documents, never by `encode_batch`: text that
spells a control token, such as `</s>`, is encoded as the characters it consists of.
"""

import hashlib
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from data_prep.command import CommandParser, DefaultsInHelp, run_command
from data_prep.documents import Problems, read_unit
from data_prep.progress import Progress, say
from data_prep.sources import hash64, parse_sources, plan_units
from training.manifest import TokenizerInfo, token_dtype, write_atomically

MODEL_FILE, JSON_FILE = "tokenizer.model", "tokenizer.json"
COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json")
LONG_TEXT_CHARACTERS = 1 << 12
"""From here on SentencePiece encodes faster in pieces, with the same ids."""
ENCODE_PIECE_CHARACTERS = 1 << 11
SENTENCE_BYTES = 4096
USUAL_NAMES = {  # of control tokens in a tokenizer.json that has no tokenizer_config.json beside it
    "bos": ("<s>", "<bos>", "<|begin_of_text|>", "<|begin▁of▁sentence|>", "<｜begin▁of▁sentence｜>"),
    "eos": ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "<|im_end|>"),
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>"),
    "mask": ("<mask>", "[MASK]", "<|mask|>"),
}


class Tokenizer(ABC):
    """Ids are 0 .. vocab_size - 1; an id that the tokenizer lacks is None (`pad_id` then falls back to `eos_id`)."""

    type: str
    path: Path
    vocab_size: int
    bos_id: int | None
    eos_id: int
    pad_id: int
    mask_id: int | None
    unk_id: int | None
    control_strings: tuple[str, ...]
    """Spellings of control tokens; in text they are ordinary characters."""
    fallback_ids: np.ndarray
    """Ids of single bytes of characters outside the vocabulary (line ends and tabs, which models often lack, excepted)."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One int array per text, without BOS and EOS."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of the ids; control tokens are left out."""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    @property
    def identity(self) -> str:
        """A hash that is the same for all files of one tokenizer, the one that an export writes included."""
        return self.sha256

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(token_dtype(self.vocab_size))

    def info(self, file: str) -> TokenizerInfo:
        """The manifest's description; `file` is the tokenizer's place inside the data set."""
        return TokenizerInfo(
            type=self.type,
            file=file,
            sha256=self.sha256,
            vocab_size=self.vocab_size,
            bos_id=self.bos_id,
            eos_id=self.eos_id,
            pad_id=self.pad_id,
            mask_id=self.mask_id,
        )

    def save(self, folder: Path) -> Path:
        """Copy the tokenizer's files into a folder under their usual names; returns the main one."""
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / (MODEL_FILE if self.type == "sentencepiece" else JSON_FILE)
        for name in COMPANIONS:
            if (companion := self.path.with_name(name)).is_file():
                write_atomically(folder / name, companion.read_bytes())
        write_atomically(target, self.path.read_bytes())
        return target

    def _check_ids(self) -> None:
        if self.eos_id is None:
            raise ValueError(
                f"{self.path} names no end-of-document token: "
                'put {"eos_token": "..."} into a tokenizer_config.json beside it'
            )
        if self.pad_id is None:
            self.pad_id = self.eos_id


class SentencePieceTokenizer(Tokenizer):
    type = "sentencepiece"

    def __init__(self, path: Path):
        self.path = path
        try:
            self._model = model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        except RuntimeError:
            raise ValueError(f"{path} is not a SentencePiece model") from None
        self.vocab_size = model.vocab_size()
        ids = range(self.vocab_size)
        control = {model.id_to_piece(i): i for i in ids if model.is_control(i)}
        self.bos_id, self.eos_id, self.pad_id, self.unk_id = (
            i if i >= 0 else None for i in (model.bos_id(), model.eos_id(), model.pad_id(), model.unk_id())
        )
        self.mask_id = next((control[name] for name in USUAL_NAMES["mask"] if name in control), None)
        self.control_strings = (*control, *(model.id_to_piece(i) for i in ids if model.is_unknown(i)))
        fallback = [i for i in ids if model.is_byte(i) and model.id_to_piece(i) not in ("<0x09>", "<0x0A>", "<0x0D>")]
        self.fallback_ids = np.array(fallback, dtype=np.int64)
        self._check_ids()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        short = [text for text in texts if len(text) < LONG_TEXT_CHARACTERS]
        encoded = iter(self._model.encode(short, return_type="numpy", num_threads=1))
        return [next(encoded) if len(text) < LONG_TEXT_CHARACTERS else self._encode_long(text) for text in texts]

    def _encode_long(self, text: str) -> np.ndarray:
        return self._model.parallel_encode(text, chunk_len=ENCODE_PIECE_CHARACTERS, num_threads=1, return_type="numpy")

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._model.decode([int(i) for i in ids])


class HuggingFaceTokenizer(Tokenizer):
    type = "huggingface"

    def __init__(self, path: Path):
        import tokenizers

        self.path = path
        try:
            self._model = model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"{path} is not a Hugging Face tokenizer: {error}") from None
        model.no_truncation()
        model.no_padding()
        vocabulary = model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        named = self._named_tokens(vocabulary)
        self.bos_id, self.eos_id, self.pad_id, self.mask_id = (named.get(kind) for kind in USUAL_NAMES)
        self.unk_id = vocabulary.get(getattr(model.model, "unk_token", None))
        added = model.get_added_tokens_decoder()
        self._mark_special([added[i].content for i in named.values() if i in added and not added[i].special])
        special = {i: token.content for i, token in model.get_added_tokens_decoder().items() if token.special}
        self.control_strings = tuple(special[i] for i in sorted(special))
        model.encode_special_tokens = True  # text that spells a special token is text
        fallback = [vocabulary.get(f"<0x{byte:02X}>") for byte in range(256) if byte not in b"\t\n\r"]
        has_fallback = bool(getattr(model.model, "byte_fallback", False))
        self.fallback_ids = np.array([i for i in fallback if has_fallback and i is not None], dtype=np.int64)
        self._check_ids()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, dtype=np.int32) for one in encoded]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._model.decode([int(i) for i in ids], skip_special_tokens=True)

    @property
    def identity(self) -> str:
        table = json.loads(self._model.to_str()) | {"post_processor": None}  # what surrounds a document is ours
        named = self.bos_id, self.eos_id, self.pad_id, self.mask_id
        return hashlib.sha256(json.dumps([table, named], sort_keys=True).encode()).hexdigest()

    def _named_tokens(self, vocabulary: dict[str, int]) -> dict[str, int]:
        """Ids of bos, eos, pad and mask: by the files beside the tokenizer, else by their usual names."""
        declared: dict[str, str] = {}
        for file in (self.path.with_name(name) for name in reversed(COMPANIONS)):
            content = json.loads(file.read_bytes()) if file.is_file() else {}
            for kind in USUAL_NAMES:
                token = content.get(f"{kind}_token")
                token = token.get("content") if isinstance(token, dict) else token
                if token is not None:
                    declared[kind] = token
        if "eos" not in declared:
            added = {token.content for token in self._model.get_added_tokens_decoder().values()}
            for kind, names in USUAL_NAMES.items():
                declared.setdefault(kind, next((name for name in names if name in added), ""))
        return {kind: vocabulary[token] for kind, token in declared.items() if token in vocabulary}

    def _mark_special(self, contents: list[str]) -> None:
        import tokenizers

        if contents:
            self._model.add_special_tokens([tokenizers.AddedToken(c, special=True, normalized=False) for c in contents])


def open_tokenizer(path: str | Path) -> Tokenizer:
    """Open a SentencePiece `.model`, a `tokenizer.json`, or a folder with one.

    Of a folder with both, the SentencePiece model is taken unless tokenizer.json has additional entries.
    """
    path = Path(path)
    if path.is_dir():
        model, table = path / MODEL_FILE, path / JSON_FILE
        if not model.is_file() and not table.is_file():
            others = sorted(path.glob("*.model"))
            if len(others) != 1:
                raise ValueError(f"{path} holds neither {MODEL_FILE} nor {JSON_FILE}")
            model = others[0]
        found = [kind(file) for kind, file in _kinds(model, table) if file.is_file()]
        return max(found, key=lambda tokenizer: tokenizer.vocab_size)
    if not path.is_file():
        raise ValueError(f"there is no tokenizer at {path}")
    return HuggingFaceTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path)


def _kinds(model: Path, table: Path) -> tuple:
    return (SentencePieceTokenizer, model), (HuggingFaceTokenizer, table)


CHARACTER_COVERAGE = 0.99995


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
    units, files = plan_units(inputs)
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
    if problems.count:
        say(f"skipped {problems.count:,} bad records, the first: {problems.examples[0]}")
    say(f"wrote {arguments.output / MODEL_FILE} ({arguments.vocab_size:,} entries, {sampled:,} characters read)")


if __name__ == "__main__":
    run_command(main)
