"""A data set of one row a source, in the place of one that is not built yet: all that a plan asks of data."""

from pathlib import Path

import numpy as np

from storage.documents import write_manifest
from storage.manifest import Manifest, PackingPolicy, SourceRows, TokenizerInfo, token_dtype
from storage.rows import RowBlock
from storage.shards import ShardWriter
from training.config import Recipe

PAD, BOS, EOS, MASK = range(4)


def write_stand_in(
    folder: Path, recipe: Recipe, seq_length: int, document_tokens: int | None = None, rows: int = 1
) -> Manifest:
    """Rows of `seq_length` tokens, of documents of so many (default: one a row), from every source that the recipe names."""
    dtype, width = token_dtype(recipe.model.vocab_size), seq_length + 1
    pairs = recipe.objective.name == "contrastive"
    size = min(document_tokens or width, width)
    lengths = [size] * (width // size) + [width % size] * bool(width % size)
    entries = {}
    for source in sources_of(recipe):
        writer = ShardWriter(folder, "train", source, width, dtype, target_spans=pairs)
        with writer:
            for first in range(0, rows, writer.batch_rows):
                writer.write(_block(min(writer.batch_rows, rows - first), lengths, dtype, pairs))
        entries[source] = SourceRows(
            documents=rows * len(lengths),
            bytes=4 * rows * width,
            tokens=rows * width,
            rows=rows,
            targets=rows * (width - len(lengths)),
            shards=writer.shards,
        )
    tokenizer = TokenizerInfo(
        type="sentencepiece",
        file="tokenizer/tokenizer.model",
        sha256="0" * 64,
        vocab_size=recipe.model.vocab_size,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=PAD,
        mask_id=MASK,
    )
    manifest = Manifest(
        created_at="2000-01-01T00:00:00Z",
        created_by={"longform": "planner"},
        inputs={},
        tokenizer=tokenizer,
        dtype=dtype,
        packing=PackingPolicy(seq_length=seq_length),
        target_spans=pairs,
        seed=0,
        splits={"train": entries},
        statistics={"tokenizer_names_without_entry": []},
    )
    return write_manifest(folder, manifest)


def sources_of(recipe: Recipe) -> list[str]:
    """Names that the data must have for the recipe to be legal."""
    named = set(recipe.data.weights or {}) | set(recipe.adapters.prior_sources)
    for stage in recipe.stages:
        named |= set(stage.weights or {})
    if recipe.adapters.mode == "routed":
        named |= set(recipe.adapters.names)
    return sorted(named) or ["text"]


def _block(rows: int, lengths: list[int], dtype: str, pairs: bool) -> RowBlock:
    pieces, width = len(lengths), sum(lengths)
    of_targets = {}
    if pairs:  # the second half of each document answers the first
        ends = np.cumsum(lengths)
        spans = np.stack([ends - np.array(lengths) // 2, ends], axis=1).astype(np.int32)
        of_targets = {
            "target_splits": np.arange(rows + 1, dtype=np.int32) * pieces,
            "target_spans": np.tile(spans, (rows, 1)),
        }
    return RowBlock(
        ids=np.full((rows, width), MASK, dtype),
        splits=np.arange(rows + 1, dtype=np.int32) * pieces,
        seg_len=np.tile(np.array(lengths, np.int32), rows),
        seg_ctx=np.zeros(rows * pieces, np.int32),
        seg_doc=np.arange(rows * pieces, dtype=np.int64),
        seg_off=np.zeros(rows * pieces, np.int64),
        **of_targets,
    )
