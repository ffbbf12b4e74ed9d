"""Documents of one unit of work to ids: in batches of about 1 MB, streaming, in bounded memory.

The reference encoder is the tokenizer itself. The optional accelerated one (package gigatoken) may never change a
result: it is used only after a start-up check on this corpus and on awkward strings, control tokens spelled out among
them, a little of every batch is checked again, and a unit in which it disagrees is redone without it.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import xxhash

from data_prep.chat import ChatFormat
from data_prep.chat_tokens import ChatEncoder
from data_prep.documents import read_unit
from data_prep.filters import Filters
from data_prep.ledger import Ledger, unit_path, write_ledger
from data_prep.records import Conversation, Document, Filtered, InputFile, Problems, SourcedDocument, Unit
from data_prep.sources import hash64, key_prefix
from data_prep.targets import Spans
from data_prep.tokenizer import Tokenizer, open_tokenizer
from data_prep.unit_file import DocumentBatch, write_unit

BATCH_CHARACTERS = 1 << 20
CHECKED_CHARACTERS = 1 << 11
CACHE_BYTES = 1 << 30
"""The accelerated encoder remembers words without limit: it is started anew when the process grew by this much."""
SAMPLE_UNITS, SAMPLE_CHARACTERS, SAMPLE_DOCUMENTS, SAMPLE_CUT = 16, 1 << 19, 1000, 1 << 13
AWKWARD = [
    *("", " ", "  ", "\n", "\r\n", "\t", "\0", "▁", " ▁ ▁▁", "\ufeff", "\u3000", "\u200b", "\U0010ffff", "\ue000"),
    *("<0x0A>", "<0x41>", "[INST]", "<|", "|>", "</", "a" * 5000, " " * 300, "\n" * 300, "1234567890" * 30),
    *(
        "e\u0301\u0301",
        "👩‍👩‍👧‍👦🏳️‍🌈",
        "नमस्ते",
        "مرحبا بالعالم",
        "中文，没有空格。",
        "ﬁ ｆｕｌｌ",
        "don't WE'RE I'll",
        "x=1;\t\ty",
    ),
]


class Disagreement(Exception):
    """The accelerated encoder gave other ids than the tokenizer."""


class Encoder:
    """Encodes texts as stored: BOS (if there is one), ids, EOS."""

    def __init__(self, tokenizer: Tokenizer, accelerated: str | None = None) -> None:
        self.tokenizer = tokenizer
        self._accelerated = accelerated
        self._fast: Any = _load_accelerated(accelerated) if accelerated is not None else None
        self._memory = psutil.Process()
        self._grown_from = self._memory.memory_info().rss
        self._batches = 0

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts behind one another, in the store's dtype, and the length of each (int64).

        Raises `Disagreement` when the accelerated encoder gives other ids for the beginning of one of the texts.
        """
        if self._fast is None or not texts:
            parts = self.tokenizer.encode_batch(texts)
        else:
            beginning = texts[self._batches % len(texts)][:CHECKED_CHARACTERS]
            *parts, fast = self._encode_fast([*texts, beginning])
            _assert_same(beginning, fast, self.tokenizer.encode_batch([beginning])[0])
        highest = max((int(part.max()) for part in parts if len(part)), default=0)
        if highest >= self.tokenizer.vocab_size:
            raise ValueError(f"{self.tokenizer.path} gave id {highest}, outside its vocabulary")
        begin = 0 if self.tokenizer.bos_id is None else 1
        lengths = np.fromiter(map(len, parts), np.int64, len(parts)) + (begin + 1)
        ends = np.cumsum(lengths)
        ids = np.empty(int(ends[-1]) if len(parts) else 0, dtype=self.tokenizer.dtype)
        if begin:
            ids[ends - lengths] = self.tokenizer.bos_id
        ids[ends - 1] = self.tokenizer.eos_id
        for part, end, length in zip(parts, ends.tolist(), lengths.tolist(), strict=True):
            ids[end - length + begin : end - 1] = part
        return ids, lengths

    def check(self, texts: Sequence[str]) -> None:
        """Raise `Disagreement` unless both encoders give the same ids for every text."""
        for text, fast, exact in zip(texts, self._encode_fast(texts), self.tokenizer.encode_batch(texts), strict=True):
            _assert_same(text, fast, exact)

    def _encode_fast(self, texts: Sequence[str]) -> list[np.ndarray]:
        layout = self._fast.encode_batch(list(texts), parallel=False).layout
        offsets, ids = np.asarray(layout.offsets.data), np.asarray(layout.content.data)
        parts = [ids[start:end] for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]
        self._batches += 1
        if self._batches % 16 == 0 and self._memory.memory_info().rss > self._grown_from + CACHE_BYTES:
            assert self._accelerated is not None
            self._fast = _load_accelerated(self._accelerated)
            self._grown_from = self._memory.memory_info().rss
        return parts


def _assert_same(text: str, fast: np.ndarray, exact: np.ndarray) -> None:
    if not np.array_equal(fast, exact):
        raise Disagreement(f"{text[:40]!r}")


def _accelerated_form(tokenizer: Tokenizer) -> str:
    """The tokenizer as gigatoken reads it, without its control tokens: in text they are ordinary characters."""
    if tokenizer.type == "huggingface":
        form = tokenizer.path.read_text()
    else:
        from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

        form = sentencepiece_to_tokenizer_json(tokenizer.path.read_bytes())
    content = json.loads(form)
    content["added_tokens"] = [token for token in content.get("added_tokens", []) if not token["special"]]
    return json.dumps(content)


def _load_accelerated(form: str) -> Any:
    import gigatoken

    return gigatoken.Tokenizer.from_json(form)


def choose_encoder(
    wanted: str, tokenizer: Tokenizer, units: list[Unit], files: list[InputFile], fields: tuple[str, str | None]
) -> tuple[str | None, str]:
    """The accelerated encoder's form of the tokenizer, or None, and why; `wanted`: auto, plain or accelerated."""
    if wanted == "plain":
        return None, "the tokenizer itself"
    try:
        texts = [document.text[:SAMPLE_CUT] for document in sample(units, files, fields)]
        form = _accelerated_form(tokenizer)
        Encoder(tokenizer, form).check([*texts, *awkward_texts(tokenizer)])
    except ImportError:
        reason = "gigatoken is not installed"
    except Disagreement as error:
        reason = f"gigatoken gives other ids, first for {error}"
    except Exception as error:  # whatever an optional package raises must not stop a build that works without it
        reason = f"gigatoken cannot use this tokenizer: {error}"
    else:
        return form, f"gigatoken, identical on {len(texts)} documents of this corpus and {len(AWKWARD)} awkward strings"
    if wanted == "accelerated":
        raise ValueError(f"--encoder accelerated: {reason}")
    return None, f"the tokenizer itself ({reason})"


def sample(units: list[Unit], files: list[InputFile], fields: tuple[str, str | None]) -> Iterator[Document]:
    """The first documents of some units spread over the corpus."""
    chosen = units[:: -(-len(units) // SAMPLE_UNITS)]
    for unit in chosen:
        left = SAMPLE_CHARACTERS // len(chosen)
        for document in islice(read_unit(unit, files, *fields, Problems("skip")), SAMPLE_DOCUMENTS // len(chosen)):
            yield document
            left -= min(len(document.text), SAMPLE_CUT)
            if left <= 0:
                break


def awkward_texts(tokenizer: Tokenizer, count: int = 500) -> list[str]:
    """Awkward strings, control tokens spelled out, and random concatenations of both (always the same ones)."""
    generator = random.Random(0)
    pieces = [*AWKWARD, *tokenizer.control_strings, "the", " The", "a", "b", ".", "é", "<", ">"]
    short = [piece for piece in pieces if len(piece) < 50]
    return [*pieces, *("".join(generator.choices(short, k=generator.randint(1, 12))) for _ in range(count))]


class Work(NamedTuple):
    """What every worker needs to encode any unit."""

    folder: Path
    tokenizer: Path
    plan_sha256: str
    files: list[InputFile]
    text_field: str
    id_field: str | None
    seed: int
    on_error: str
    accelerated: str | None
    chat: ChatFormat | None = None
    source_field: str | None = None
    filters: tuple[str, ...] = ()


class UnitEncoder:
    """Encodes whole units into the token store; `report(bytes, tokens)` is called after every batch."""

    def __init__(self, work: Work, report: Callable[[int, int], None]) -> None:
        self.work, self.report = work, report
        self.tokenizer = open_tokenizer(work.tokenizer)
        self.encoder = Encoder(self.tokenizer, work.accelerated)
        self.chat_encoder = ChatEncoder(self.tokenizer) if work.chat else None
        self.filters = Filters(work.filters)

    def run(self, unit: Unit) -> Ledger:
        """Write the unit's file, then its ledger, by which it counts as done."""
        try:
            return self._run(unit, self.encoder, disagreed=False)
        except Disagreement:
            return self._run(unit, Encoder(self.tokenizer), disagreed=True)

    def _run(self, unit: Unit, encoder: Encoder, disagreed: bool) -> Ledger:
        work, problems, digest = self.work, Problems(self.work.on_error), hashlib.sha256()
        counts = dict.fromkeys(("documents", "text_bytes", "tokens", "unknown", "fallback", "empty"), 0)
        counts |= {"targets": 0} if work.chat else {}
        how = work.text_field, work.id_field, problems, digest, work.chat, work.source_field
        filtered: list[Filtered] = []
        documents = self.filters.kept(read_unit(unit, work.files, *how), filtered)
        batches = self._encode(_batches(documents, counts), unit, encoder, counts)
        path, has = unit_path(work.folder, unit.index), (work.chat is not None, work.source_field is not None)
        sha256, size = write_unit(path, self.tokenizer.dtype, batches, *has)
        ledger = Ledger(
            unit=unit.index,
            plan_sha256=work.plan_sha256,
            input_sha256=digest.hexdigest(),
            sha256=sha256,
            file_bytes=size,
            skipped=dict(sorted(problems.reasons.items())),
            examples=problems.examples,
            left_out=problems.left_out,
            filtered=filtered,
            disagreed=disagreed,
            **counts,
        )
        write_ledger(work.folder, ledger)
        return ledger

    def _encode(
        self, batches: Iterable[list[Document]], unit: Unit, encoder: Encoder, counts: dict[str, int]
    ) -> Iterator[DocumentBatch]:
        rare = np.zeros(self.tokenizer.vocab_size, dtype=np.uint8)  # 1: unknown, 2: byte of an unknown character
        rare[self.tokenizer.fallback_ids] = 2
        if self.tokenizer.unk_id is not None:
            rare[self.tokenizer.unk_id] = 1
        for batch in batches:
            targets: Spans | None = None
            target_bytes: list[int] | None = None
            if self.chat_encoder is None:
                ids, lengths = encoder.encode([document.text for document in batch])
            else:
                chats = [document.chat for document in batch if isinstance(document, Conversation)]
                ids, lengths, targets, target_bytes = self.chat_encoder.encode(chats)
                counts["targets"] += targets.tokens
            texts = [document.text.encode() for document in batch]
            kinds = rare[ids]
            counts["documents"] += len(batch)
            counts["tokens"] += len(ids)
            counts["unknown"] += int(np.count_nonzero(kinds == 1))
            counts["fallback"] += int(np.count_nonzero(kinds == 2))
            nbytes = [len(text) for text in texts]
            counts["text_bytes"] += sum(nbytes)
            prefix = key_prefix(self.work.seed, unit.source)
            yield DocumentBatch(
                ids,
                lengths,
                [document.key for document in batch],
                nbytes,
                [hash64(prefix + document.key) for document in batch],
                [xxhash.xxh3_128_digest(text) for text in texts],
                targets,
                target_bytes,
                [str(document.source) for document in batch if isinstance(document, SourcedDocument)]
                if self.work.source_field
                else None,
            )
            self.report(sum(nbytes), len(ids))


def _batches(documents: Iterable[Document], counts: dict[str, int]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in documents:
        if not document.text or document.text.isspace():
            counts["empty"] += 1
            continue
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
