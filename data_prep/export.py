"""A data set in the files of other programs: Megatron's .bin and .idx, MosaicML's MDS, or parquet.

    python -m data_prep.export DATA --format megatron|mds|parquet -o OUT [--of documents|rows]

Documents come whole, as they are stored (BOS and EOS included, removed duplicates left out), for programs that pack them
themselves; rows as they were packed, with the pieces of documents in them. The data set is verified, every byte, before any
of it is used, and no sequence is cut or left out. OUT appears when it is complete, with `export.json` (sizes, hashes, where
it comes from), which `python -m data_prep.verify OUT [--full]` checks. After a kill the same command continues with the
files that are not finished. Layouts of the files: data_prep/export_files.py.
"""

if __name__ == "__main__":
    from console.command import end_at_ctrl_c

    end_at_ctrl_c()

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from console.command import CommandParser, run_command
from console.progress import Progress
from data_prep.export_files import (
    EXPORT_FILE,
    FORMATS,
    Entry,
    FilePart,
    Format,
    WrittenPart,
    export_problems,
    file_facts,
    read_export,
    write_mds_index,
)
from data_prep.plan import TOKENIZER_FOLDER, TOKENS_FOLDER
from data_prep.store import StoredDocuments, TokenStore
from data_prep.verify import problems
from storage.atomic import continued_folder, write_atomically
from storage.manifest import Manifest, read_manifest
from storage.rows import TARGET_COLUMN
from storage.shards import ShardedDataset

What = Literal["documents", "rows"]
EXPORT_VERSION = 1
PARTS_FOLDER = ".parts"


class WholeDocuments:
    """The documents of each source of each split; entry i is the i-th that was not removed."""

    def __init__(self, data: Path, manifest: Manifest) -> None:
        folder = data / TOKENS_FOLDER
        if not folder.is_dir():
            raise ValueError(f"{folder} is gone, so documents cannot be exported (rows can: --of rows)")
        self.store, self.spans = TokenStore.open(folder), manifest.target_spans

    def sizes(self, split: str, source: str) -> np.ndarray:
        """Tokens of each entry, int64 [entries]."""
        return self.of(split, source).length

    def of(self, split: str, source: str) -> StoredDocuments:
        return self.store.documents(split, source)

    def entries(self, part: FilePart) -> Iterator[Entry]:
        documents = self.of(part.split, part.source)
        for i in range(part.first, part.last):
            tokens, number = documents.tokens(i), int(documents.doc[i])
            fields: dict[str, Any] = {"document": number, "key": documents.key(i), "source": part.source}
            if self.spans:
                targets, _ = self.store.targets(documents.doc[i : i + 1])
                fields[TARGET_COLUMN] = np.stack([targets.begin, targets.end], axis=1).astype(np.int64)
            yield Entry(tokens, np.array([len(tokens)], np.int32), fields)


class PackedRows:
    """The packed rows of each source of each split."""

    def __init__(self, data: Path, manifest: Manifest) -> None:
        self.splits = {split: ShardedDataset(data, split, manifest) for split in manifest.splits}
        self.row_tokens = manifest.packing.row_tokens

    def sizes(self, split: str, source: str) -> np.ndarray:
        """Tokens of each entry, int64 [entries]."""
        return np.full(self.splits[split].rows_per_source.get(source, 0), self.row_tokens, np.int64)

    def entries(self, part: FilePart) -> Iterator[Entry]:
        dataset = self.splits[part.split]
        for i in range(part.first, part.last):
            row, spans = dataset.row(part.source, i), dataset.spans(part.source, i)
            fields = {"row": i, "source": part.source} | {name: getattr(row, name) for name in row._fields[1:]}
            yield Entry(row.ids, row.seg_len, fields if spans is None else fields | {TARGET_COLUMN: spans})


def export(data: Path, format_: str, output: Path, of: What = "documents") -> dict[str, Any]:
    """Write all splits and sources of a data set; return what `export.json` says. Raises ValueError."""
    manifest = read_manifest(data)
    plan: dict[str, Any] = {"version": EXPORT_VERSION, "format": format_, "of": of, "fingerprint": manifest.fingerprint}
    if (output / EXPORT_FILE).exists():
        there = read_export(output)
        if {key: there.get(key) for key in plan} != plan:
            raise ValueError(f"{output} is an export of something else, or another one: choose another --output")
        for words in (words for _, words in export_problems(output, full=True) if words):
            raise ValueError(f"{words}, or choose another --output")
        return there
    if output.is_symlink() or (output.exists() and not (output.is_dir() and not any(output.iterdir()))):
        raise ValueError(f"{output} is there already: choose another --output, or remove it")
    if manifest.target_spans and not FORMATS[format_].spans:
        raise ValueError(
            f"{data} holds conversations of which only a part carries loss, and a .bin cannot say which: "
            "use --format mds or parquet"
        )
    content: WholeDocuments | PackedRows = (
        WholeDocuments(data, manifest) if of == "documents" else PackedRows(data, manifest)
    )
    _verify(data, manifest)
    marker, busy = (
        f"{PARTS_FOLDER}/plan.json",
        f"another export is writing to {output}: wait for it or choose another --output",
    )
    with continued_folder(output, marker, json.dumps(plan).encode(), busy) as partial:
        for path in partial.rglob("*.tmp"):
            path.unlink()
        exported = plan | _write(partial, manifest, content, FORMATS[format_])
        exported["files"] += _copy_tokenizer(data, partial, manifest)
        shutil.rmtree(partial / PARTS_FOLDER)
        write_atomically(partial / EXPORT_FILE, json.dumps(exported, indent=1).encode())
    return exported


def _verify(data: Path, manifest: Manifest) -> None:
    total = sum(shard.bytes for sources in manifest.splits.values() for e in sources.values() for shard in e.shards)
    with Progress("verifying", total) as progress:
        for size, problem in problems(data, full=True):
            if problem:
                raise ValueError(problem)
            progress.advance(size)


def _write(partial: Path, manifest: Manifest, content: WholeDocuments | PackedRows, writer: Format) -> dict[str, Any]:
    dtype = "uint16" if manifest.dtype == "uint16" else "int32"
    files: list[dict[str, Any]] = []
    splits: dict[str, dict[str, Any]] = {}
    parts = {split: {source: _parts(content, split, source, dtype, writer.part_bytes) for source in sources}
             for split, sources in manifest.splits.items()}  # fmt: skip
    total = sum(int(content.sizes(split, source).sum()) for split in parts for source in parts[split])
    with Progress("exporting", total * np.dtype(dtype).itemsize) as progress:
        for split, sources in parts.items():
            splits[split] = {}
            for source, mine in sources.items():
                sizes = content.sizes(split, source)
                indexes = []
                for part in mine:
                    done = _done(partial, part)
                    tokens = int(sizes[part.first : part.last].sum())
                    if done is None:
                        written = writer.write(partial, part, content.entries(part), dtype)
                        done = _finish_part(partial, part, written)
                    files += done["files"]
                    indexes.append(done["shard"])
                    progress.advance(tokens * np.dtype(dtype).itemsize, tokens)
                if indexes and indexes[0] is not None:
                    files.append(file_facts(partial, write_mds_index(partial, split, source, indexes)))
                weight = manifest.splits[split][source].weight
                splits[split][source] = {"entries": len(sizes), "tokens": int(sizes.sum()), "weight": weight}
    ids = manifest.tokenizer.model_dump(include={"vocab_size", "bos_id", "eos_id", "pad_id", "mask_id"})
    return {"dtype": dtype, **ids, "splits": splits, "files": files}


def _parts(
    content: WholeDocuments | PackedRows, split: str, source: str, dtype: str, part_bytes: int | None
) -> list[FilePart]:
    """A part ends with the entry by which it reaches its bytes."""
    sizes = content.sizes(split, source) * np.dtype(dtype).itemsize
    if not len(sizes):
        return []
    edges = [0, len(sizes)]
    if part_bytes is not None:
        ends = np.cumsum(sizes)
        edges = [0]
        while edges[-1] < len(sizes):
            before = ends[edges[-1] - 1] if edges[-1] else 0
            edges.append(min(len(sizes), int(np.searchsorted(ends, before + part_bytes)) + 1))
    return [FilePart(split, source, number, edges[number], edges[number + 1]) for number in range(len(edges) - 1)]


def _done(partial: Path, part: FilePart) -> dict[str, Any] | None:
    """What is known of a part that an interrupted export finished."""
    try:
        ledger = json.loads((partial / PARTS_FOLDER / f"{part.name}.json").read_bytes())
        intact = all((partial / facts["file"]).stat().st_size == facts["bytes"] for facts in ledger["files"])
    except (OSError, ValueError):
        return None
    return ledger if intact else None


def _finish_part(partial: Path, part: FilePart, written: WrittenPart) -> dict[str, Any]:
    ledger = {"files": [file_facts(partial, file) for file in written.files], "shard": written.shard}
    write_atomically(partial / PARTS_FOLDER / f"{part.name}.json", json.dumps(ledger).encode())
    return ledger


def _copy_tokenizer(data: Path, partial: Path, manifest: Manifest) -> list[dict[str, Any]]:
    """Ids mean nothing without it."""
    files = [manifest.tokenizer.file, *manifest.tokenizer_files]
    (partial / TOKENIZER_FOLDER).mkdir(exist_ok=True)
    for file in files:
        write_atomically(partial / file, (data / file).read_bytes())
    return [file_facts(partial, file) for file in files]


def main() -> None:
    parser = CommandParser(prog="python -m data_prep.export", description=__doc__)
    parser.add_argument("data", type=Path, help="folder made by data_prep.build")
    parser.add_argument("--format", choices=sorted(FORMATS), required=True, help="whose files")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="folder to make")
    what = "documents: whole, packed by the other program; rows: as packed here (default: %(default)s)"
    parser.add_argument("--of", choices=("documents", "rows"), default="documents", help=what)
    arguments = parser.parse_args()
    exported = export(arguments.data, arguments.format, arguments.output, arguments.of)
    size = sum(facts["bytes"] for facts in exported["files"])
    print(f"{arguments.output}: {size / 1e6:,.1f} MB in {len(exported['files']):,} files, ids as {exported['dtype']}")
    for split, sources in exported["splits"].items():
        for source, counts in sources.items():
            print(f"  {split:<11} {source}: {counts['entries']:,} {arguments.of}, {counts['tokens']:,} tokens")


if __name__ == "__main__":
    run_command(main)
