"""Small packed data sets for tests: documents whose every token tells where it came from."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from data_prep.pack import Packing, pack, write_split
from data_prep.targets import spans_of
from storage.documents import write_manifest
from storage.manifest import Manifest, PackingPolicy, SourceRows, TokenizerInfo, token_dtype
from storage.shards import ShardWriter

PAD = 3


def document_tokens(doc: int, length: int, vocab_size: int) -> np.ndarray:
    """Ids in [4, vocab_size) that depend on the document and the offset."""
    mixed = (np.arange(length, dtype=np.uint64) + 1) * np.uint64(2654435761) + np.uint64(doc * 40503 + 17)
    return (4 + mixed * np.uint64(0x9E3779B97F4A7C15) % np.uint64(vocab_size - 4)).astype(token_dtype(vocab_size))


Make = Callable[[int, int, int], np.ndarray]
"""Of a document's number, its length and the size of the vocabulary: its ids."""


class MadeDocuments:
    """Documents numbered from `first`, as the token store would hand them to packing."""

    def __init__(self, lengths: Sequence[int], vocab_size: int, first: int = 0, make: Make = document_tokens):
        self.length = np.array(lengths, np.int64)
        self.doc = first + np.arange(len(lengths))
        self.vocab_size, self.make = vocab_size, make

    def tokens(self, i: int) -> np.ndarray:
        return self.make(int(self.doc[i]), int(self.length[i]), self.vocab_size)


def build(
    directory: Path,
    lengths: Mapping[str, Sequence[int]],
    seq_length: int,
    *,
    vocab_size: int = 1000,
    weights: Mapping[str, float] | None = None,
    seed: int = 0,
    splits: Sequence[str] = ("train",),
    rows_per_shard: int | None = None,
    masks: Mapping[str, Sequence[np.ndarray]] | None = None,
    make: Make = document_tokens,
    **policy,
) -> Manifest:
    """A data set of the documents `lengths[source]`, the same in every split; `masks`: which of their tokens carry loss."""
    packing_policy = PackingPolicy(seq_length=seq_length, **policy)
    entries = {}
    for split in splits:
        entries[split], first = {}, 0
        for source, of_source in lengths.items():
            documents = MadeDocuments(of_source, vocab_size, first, make)
            first += len(of_source)
            packing = pack(documents.length, packing_policy.row_tokens, packing_policy, seed)
            if masks is not None:
                packing = packing.with_targets(spans_of(masks[source]))
            writer = ShardWriter(
                directory,
                split,
                source,
                packing.row_tokens,
                token_dtype(vocab_size),
                rows_per_shard=rows_per_shard,
                target_spans=masks is not None,
            )
            shards = write_split(documents, packing, writer, PAD)
            entries[split][source] = source_rows(documents, packing, shards, (weights or {}).get(source))
    tokenizer = TokenizerInfo(
        type="sentencepiece",
        file="tokenizer/tokenizer.model",
        sha256="0" * 64,
        vocab_size=vocab_size,
        bos_id=1,
        eos_id=2,
        pad_id=PAD,
        mask_id=None,
    )
    manifest = Manifest(
        created_at="2026-01-01T00:00:00Z",
        created_by={"longform": "test"},
        inputs=dict.fromkeys(lengths, "1" * 64),
        tokenizer=tokenizer,
        dtype=token_dtype(vocab_size),
        packing=packing_policy,
        target_spans=masks is not None,
        seed=seed,
        splits=entries,
    )
    return write_manifest(directory, manifest)


def source_rows(documents: MadeDocuments, packing: Packing, shards: list, weight: float | None) -> SourceRows:
    tokens = int(documents.length.sum())
    return SourceRows(
        documents=len(documents.doc),
        bytes=4 * tokens,
        tokens=tokens,
        rows=packing.rows,
        targets=packing.targets,
        weight=weight,
        shards=shards,
    )
