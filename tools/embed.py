"""Vectors of documents for semantic search, and how well they find a document.

python -m tools.embed RUN|HF_DIR --input FILES --output DIR [--adapter NAME] [--pooling mean|last]
python -m tools.embed RUN|HF_DIR --evaluate PAIRS [--query-field query] [--document-field document]

A document is cut into chunks without overlap, as long as the rows of the training, and each has one vector of length 1, so
that a search finds the best chunk of a document. DIR, which appears when it is complete, holds vectors.npy (float32),
chunks.parquet (for each vector key, start and end: characters of the document), index.faiss (faiss.read_index; exact, inner
products, which are cosines) and about.json.

PAIRS are records with two fields. Printed is how often the document of a query comes first, or among the first 5 or 10, and
the mean of 1 / rank: of the model, of the base if it is an adapter, and of BM25.
"""

import argparse
import json
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from console.command import CommandParser, DefaultsInHelp, run_command
from console.progress import Progress, say
from storage.atomic import finished_folder, write_atomically
from tools.model_flags import add_model_flags

if TYPE_CHECKING:
    from tools.embedding import Embedder, Vectors


def main() -> None:
    arguments = parsed()
    if arguments.evaluate:
        evaluate(arguments)
        return
    from tools.embedding import Input

    texts = Input(tuple(arguments.input), arguments.text_field, arguments.id_field)
    size = texts.size()
    embed = embedder(arguments, arguments.adapter)
    with Progress("embedding", size) as progress:
        vectors = embed(texts.documents(), progress)
    output = arguments.output
    write(vectors, about(arguments, embed), output)
    chunks, width = vectors.vectors.shape
    print(f"{len(vectors.starts):,} documents, {chunks:,} vectors of {width:,} numbers in {output}")


def parsed() -> argparse.Namespace:
    parser = CommandParser(prog="python -m tools.embed", description=__doc__, formatter_class=DefaultsInHelp)
    add_model_flags(parser)
    parser.add_argument(
        "--pooling", choices=("mean", "last"), default="mean", help="over a chunk's tokens, or the last"
    )
    chunk_help = "tokens of the longest chunk, its beginning included; those of a row in training by default"
    parser.add_argument("--chunk-tokens", type=int, metavar="N", help=chunk_help)
    parser.add_argument("--batch-tokens", type=int, default=4096, metavar="N", help="tokens in one forward pass")
    documents = parser.add_argument_group("vectors of documents")
    documents.add_argument("--input", nargs="+", metavar="PATH", help="files or folders, as data_prep.build reads them")
    documents.add_argument("--text-field", default="text", help="field or column that holds the text")
    documents.add_argument(
        "--id-field", help="field or column that names a document; its place in the input by default"
    )
    documents.add_argument("--output", type=Path, help="new folder")
    pairs = parser.add_argument_group("search of documents that belong to queries")
    pairs.add_argument("--evaluate", nargs="+", metavar="PAIRS", help="files with pairs of a query and its document")
    pairs.add_argument("--query-field", default="query", help="field or column that holds the query")
    pairs.add_argument("--document-field", default="document", help="field or column that holds the document")
    pairs.add_argument("--json", help="also write the figures to this file")
    arguments = parser.parse_args()
    if bool(arguments.input) == bool(arguments.evaluate) or bool(arguments.input) != bool(arguments.output):
        raise ValueError("give --input and --output for vectors of documents, or --evaluate for a measurement")
    if arguments.output and arguments.output.exists():
        raise ValueError(f"--output {arguments.output} exists already: give a folder that is new")
    if arguments.json and (arguments.input or not Path(arguments.json).absolute().parent.is_dir()):
        raise ValueError(f"--json {arguments.json}: it is for --evaluate, and its folder must be there")
    if arguments.batch_tokens < 1:
        raise ValueError(f"--batch-tokens {arguments.batch_tokens}: at least 1")
    module, package = ("bm25s", "bm25s") if arguments.evaluate else ("faiss", "faiss-cpu")
    if find_spec(module) is None:
        raise ValueError(f"tools.embed needs {package} here, which is in requirements-extra.txt: pip install {package}")
    return arguments


def embedder(arguments: argparse.Namespace, adapter: str | None) -> "Embedder":
    from tools.embedding import Embedder
    from tools.trained import open_trained

    trained = open_trained(arguments.source, arguments.step, arguments.device, arguments.dtype, adapter)
    if trained.model.config.adapters.members:
        raise ValueError(f"{trained.name} mixes adapters and has no hidden states of its own: choose --adapter NAME")
    tokens = arguments.chunk_tokens
    if tokens is None:
        tokens = trained.model.config.max_position_embeddings
        if trained.checkpoint is not None:
            from engine.checkpoint.folder import find
            from tools.export import exported_config

            tokens = exported_config(find(Path(arguments.source), arguments.step)[1])[0].max_position_embeddings
    return Embedder(trained, arguments.pooling, tokens, arguments.batch_tokens)


def about(arguments: argparse.Namespace, embed: "Embedder") -> dict[str, Any]:
    return {
        "model": embed.trained.name,
        "source": str(Path(arguments.source).resolve()),
        "checkpoint": embed.trained.checkpoint,
        "adapter": arguments.adapter,
        "pooling": embed.pooling,
        "chunk_tokens": embed.window_tokens,
        "dtype": arguments.dtype,
    }


def write(vectors: "Vectors", facts: dict[str, Any], output: Path) -> None:
    """The folder `output`, complete or not at all."""
    import faiss
    import numpy as np
    import pyarrow as pa
    from pyarrow import parquet

    index = faiss.IndexFlatIP(vectors.vectors.shape[1])
    index.add(vectors.vectors)
    start, end = vectors.spans.T
    chunks = pa.table({"key": vectors.keys, "start": start, "end": end})
    with finished_folder(output) as partial:
        partial.mkdir()
        _write_synced(partial / "vectors.npy", lambda file: np.save(file, vectors.vectors))
        _write_synced(partial / "chunks.parquet", lambda file: parquet.write_table(chunks, file))
        _write_synced(partial / "index.faiss", lambda file: file.write(faiss.serialize_index(index)))
        write_atomically(partial / "about.json", json.dumps(facts, indent=1).encode())


def _write_synced(path: Path, write_to: Callable[[Any], Any]) -> None:
    with path.open("wb") as file:
        write_to(file)
        file.flush()
        os.fsync(file.fileno())


def evaluate(arguments: argparse.Namespace) -> None:
    """Print the table of all ways to search the documents of the pairs."""
    from tools.evaluation.retrieval import Pairs, by_vectors, by_words

    pairs = Pairs.read(arguments.evaluate, arguments.query_field, arguments.document_field)
    wanted = [arguments.adapter]
    if arguments.adapter not in (None, "base"):
        wanted.append("base")
    found: dict[str, dict[str, float]] = {}
    facts: dict[str, Any] = {}
    for adapter in wanted:
        embed = embedder(arguments, adapter)
        say(f"{embed.trained.name}: {len(pairs.queries):,} queries, {len(pairs.documents):,} documents")
        found[embed.trained.name] = by_vectors(embed, pairs).figures()
        facts = facts or about(arguments, embed)
    found["BM25"] = by_words(pairs).figures()
    table = Table("", *found["BM25"], title=f"{len(pairs.queries):,} queries, {len(pairs.documents):,} documents")
    for name, figures in found.items():
        table.add_row(name, *(f"{figure:.3f}" for figure in figures.values()))
    Console().print(table)
    if arguments.json:
        write_atomically(Path(arguments.json), json.dumps(facts | {"found": found}, indent=1).encode())


if __name__ == "__main__":
    run_command(main)
