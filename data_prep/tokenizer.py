"""Tokenizers: any SentencePiece model or Hugging Face `tokenizer.json` behind one interface, and training a new one.

    python -m data_prep.tokenizer train --input DOCS... --vocab-size 32000 --output TOK

BOS and EOS mark document boundaries and are added by whoever stores documents, never by `encode_batch`: text that
spells a control token, such as `</s>`, is encoded as the characters it consists of.
"""

if __name__ == "__main__":
    from console.command import end_at_ctrl_c

    end_at_ctrl_c()

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import sentencepiece

from console.command import run_command
from data_prep.tokenizer_files import (
    CONFIG_FILE,
    JSON_FILE,
    MAP_FILE,
    MODEL_FILE,
    check_companions,
    copy_companions,
    read_config,
)
from data_prep.tokenizer_training import main
from storage.atomic import write_atomically
from storage.manifest import TokenizerInfo, token_dtype

LONG_TEXT_CHARACTERS = 1 << 12
"""From here on SentencePiece encodes faster in pieces, with the same ids."""
ENCODE_PIECE_CHARACTERS = 1 << 11
MOST_ENTRIES = 1 << 24
USUAL_NAMES = {  # of control tokens in a tokenizer.json that has no tokenizer_config.json beside it
    "bos": ("<s>", "<bos>", "<|begin_of_text|>", "<|begin▁of▁sentence|>", "<｜begin▁of▁sentence｜>"),
    "eos": ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "<|im_end|>"),
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>"),
    "mask": ("<mask>", "[MASK]", "<|mask|>"),
}


class Tokenizer(ABC):
    """Ids are 0 .. vocab_size - 1; an id that the tokenizer lacks is None (`pad_id` then falls back to `eos_id`)."""

    type: Literal["sentencepiece", "huggingface"]
    path: Path
    vocab_size: int
    bos_id: int | None
    eos_id: int
    pad_id: int
    mask_id: int | None
    unk_id: int | None
    control_strings: tuple[str, ...]
    """Spellings of control tokens; in text they are ordinary characters."""
    notices: list[str]
    """Sentences about what the files say and what cannot be followed."""
    fallback_ids: np.ndarray
    """Ids of single bytes of characters outside the vocabulary (line ends and tabs, which models often lack, excepted)."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One int array per text, without BOS and EOS."""

    @abstractmethod
    def encode_with_offsets(self, text: str, control: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Ids, int64 [n], and the characters of the text that each stands for, int64 [n, 2].

        `control` (Hugging Face tokenizers alone): the spelling of a control token is the token.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of the ids; control tokens are left out."""

    @abstractmethod
    def vocabulary(self) -> dict[str, int]:
        """The id of every entry, added tokens included."""

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

    def file_in(self, folder: Path) -> Path:
        """Where `save` puts the main file."""
        return folder / (MODEL_FILE if self.type == "sentencepiece" else JSON_FILE)

    def save(self, folder: Path) -> Path:
        """Copy the tokenizer's files into a folder under their usual names; returns the main one."""
        folder.mkdir(parents=True, exist_ok=True)
        copy_companions(self.path.parent, folder)
        if self.type == "sentencepiece" and (table := self.path.with_name(JSON_FILE)).is_file():
            write_atomically(folder / JSON_FILE, table.read_bytes())
        write_atomically(target := self.file_in(folder), self.path.read_bytes())
        return target

    def _check_ids(self) -> None:
        if self.eos_id is None:
            raise ValueError(
                f'{self.path} names no end-of-document token: put {{"eos_token": "..."}} into a {CONFIG_FILE} beside it'
            )
        if self.pad_id is None:
            self.pad_id = self.eos_id

    def _declared(self) -> dict[str, str]:
        """Spellings of bos, eos, pad and mask tokens by the files beside this one. Raises ValueError for faults in them."""
        config = check_companions(self.path.parent)
        return {kind: token for kind in USUAL_NAMES if (token := config.content(kind)) is not None}

    def _place(self, kind: str) -> str:
        """The file that declares such a token."""
        config = self.path.with_name(CONFIG_FILE)
        return str(config if read_config(config)[0].content(kind) is not None else config.with_name(MAP_FILE))


class SentencePieceTokenizer(Tokenizer):
    type = "sentencepiece"

    def __init__(self, path: Path) -> None:
        self.path, self.notices = path, []
        self._model = model = sentencepiece.SentencePieceProcessor()
        try:
            model.LoadFromSerializedProto(_content(path))
        except (RuntimeError, UnicodeDecodeError):
            raise ValueError(f"{path} is not a SentencePiece model") from None
        self.vocab_size = model.vocab_size()
        ids = range(self.vocab_size)
        try:
            pieces = [model.id_to_piece(i) for i in ids]
            single_bytes = {i: int(pieces[i][3:5], 16) for i in ids if model.is_byte(i)}
        except ValueError as error:  # UnicodeDecodeError is one
            raise ValueError(f"{path} is damaged: an entry is not text ({error})") from None
        control = {pieces[i]: i for i in ids if model.is_control(i)}
        own = (model.bos_id(), model.eos_id(), model.pad_id(), model.unk_id())
        given: list[Any] = [i if i >= 0 else None for i in own]  # what must be there is checked below
        self.bos_id, self.eos_id, self.pad_id, self.unk_id = given
        self.mask_id = next((control[name] for name in USUAL_NAMES["mask"] if name in control), None)
        self.control_strings = (*control, *(pieces[i] for i in ids if model.is_unknown(i)))
        self.fallback_ids = np.array([i for i, byte in single_bytes.items() if byte not in b"\t\n\r"], dtype=np.int64)
        self._read_names(control)
        self._check_ids()

    def _read_names(self, control: dict[str, int]) -> None:
        """An end-of-document token that only the files beside the model name; what else they name is the model's to say."""
        declared = self._declared()
        if self.eos_id is None and (eos := declared.get("eos")) is not None:
            if eos not in control:
                known = self._model.id_to_piece(self._model.piece_to_id(eos)) == eos
                reason = "an entry that text can yield" if known else "not in its vocabulary"
                remedy = f"name one of {', '.join(control)}" if control else "use a model that has control tokens"
                raise ValueError(
                    f"{self._place('eos')}: eos_token {eos!r} is no control token of {self.path} but {reason}: {remedy}"
                )
            self.eos_id = control[eos]
        for kind, token in declared.items():
            known = getattr(self, f"{kind}_id")
            if (None if known is None else self._model.id_to_piece(known)) != token:
                own = "none" if known is None else repr(self._model.id_to_piece(known))
                self.notices.append(f"{self._place(kind)} names {token!r} as {kind}_token, {self.path.name} {own}")

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        short = [text for text in texts if len(text) < LONG_TEXT_CHARACTERS]
        encoded = iter(self._model.encode(short, return_type="numpy", num_threads=1))
        return [next(encoded) if len(text) < LONG_TEXT_CHARACTERS else self._encode_long(text) for text in texts]

    def _encode_long(self, text: str) -> np.ndarray:
        return self._model.parallel_encode(text, chunk_len=ENCODE_PIECE_CHARACTERS, num_threads=1, return_type="numpy")

    def encode_with_offsets(self, text: str, control: bool = False) -> tuple[np.ndarray, np.ndarray]:
        assert not control
        encoded = self._model.encode(text, return_type="offset_mapping")
        return np.array(encoded["ids"], np.int64), np.array(encoded["offsets"], np.int64).reshape(-1, 2)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._model.decode([int(i) for i in ids])

    def vocabulary(self) -> dict[str, int]:
        return {self._model.id_to_piece(i): i for i in range(self.vocab_size)}


class HuggingFaceTokenizer(Tokenizer):
    type = "huggingface"

    def __init__(self, path: Path) -> None:
        import tokenizers

        self.path, self.notices = path, []
        content = _content(path)
        try:
            self._model = model = tokenizers.Tokenizer.from_buffer(content)
        except BaseException as error:  # the library raises bare Exceptions, and panics
            if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
                raise
            raise ValueError(f"{path} is not a Hugging Face tokenizer: {error}") from None
        model.no_truncation()
        model.no_padding()
        vocabulary = model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        if not 0 < self.vocab_size <= MOST_ENTRIES:
            raise ValueError(f"{path} has {self.vocab_size:,} entries; 1 to {MOST_ENTRIES:,} can be used")
        named = self._named_tokens(vocabulary)
        given: list[Any] = [named.get(kind) for kind in USUAL_NAMES]  # what must be there is checked below
        self.bos_id, self.eos_id, self.pad_id, self.mask_id = given
        unknown: Any = getattr(model.model, "unk_token", None)
        self.unk_id = vocabulary.get(unknown)
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
        try:
            encoded = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"{self.path} cannot encode every text: {error}") from None
        return [np.array(one.ids, dtype=np.int32) for one in encoded]

    def encode_with_offsets(self, text: str, control: bool = False) -> tuple[np.ndarray, np.ndarray]:
        self._model.encode_special_tokens = not control
        try:
            encoded = self._model.encode(text, add_special_tokens=False)
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"{self.path} cannot encode every text: {error}") from None
        finally:
            self._model.encode_special_tokens = True
        return np.array(encoded.ids, np.int64), np.array(encoded.offsets, np.int64).reshape(-1, 2)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._model.decode([int(i) for i in ids], skip_special_tokens=True)

    def vocabulary(self) -> dict[str, int]:
        return self._model.get_vocab(with_added_tokens=True)

    @property
    def identity(self) -> str:
        table = json.loads(self._model.to_str()) | {"post_processor": None}  # what surrounds a document is ours
        named = self.bos_id, self.eos_id, self.pad_id, self.mask_id
        return hashlib.sha256(json.dumps([table, named], sort_keys=True).encode()).hexdigest()

    def _named_tokens(self, vocabulary: dict[str, int]) -> dict[str, int]:
        """Ids of bos, eos, pad and mask: by the files beside the tokenizer, else by their usual names."""
        declared = self._declared()
        missing = {kind: token for kind, token in declared.items() if token not in vocabulary}
        if "eos" in missing:
            raise ValueError(
                f"{self._place('eos')}: eos_token {missing['eos']!r} is not in the vocabulary of {self.path}: name a token "
                "that is, or add it to both"
            )
        self.notices += [
            f"{self._place(kind)}: {kind}_token {token!r} is not in the vocabulary of {self.path.name} and left out"
            for kind, token in missing.items()
        ]
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

    Of a folder with both, the SentencePiece model is taken unless tokenizer.json has additional entries, or the model
    cannot be read: a tokenizer.model of tiktoken's form, say. Raises ValueError in one sentence.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"there is no tokenizer at {path}")
    if not path.is_dir():
        return _open_file(path)
    opened, problems = [], []
    for file in _main_files(path):
        try:
            opened.append(_open_file(file))
        except ValueError as error:
            problems.append(str(error))
    if not opened:
        raise ValueError("; ".join(dict.fromkeys(problems)))
    taken = max(opened, key=lambda tokenizer: tokenizer.vocab_size)
    taken.notices += [f"{problem}; {taken.path.name} is taken" for problem in problems]
    return taken


def _main_files(folder: Path) -> list[Path]:
    """A folder's SentencePiece model and tokenizer.json, those that are there."""
    found = [file for file in (folder / MODEL_FILE, folder / JSON_FILE) if file.exists()]
    if not found:
        found = [file for file in sorted(folder.glob("*.model")) if file.is_file()]
        if len(found) != 1:
            raise ValueError(f"{folder} holds neither {MODEL_FILE} nor {JSON_FILE}")
    return found


def _open_file(path: Path) -> Tokenizer:
    return HuggingFaceTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path)


def _content(path: Path) -> bytes:
    """Of a tokenizer's file; ValueError when there is none."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    if not content:
        raise ValueError(f"{path} is empty")
    return content


if __name__ == "__main__":
    run_command(main)
