"""What other tools write is read as it is: a command each."""

import gzip
import json

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import build
from data_prep.store import TokenStore
from tests.data_prep.texts import PROSE, write_lines

TEXTS = {f"doc-{i}": text for i, text in enumerate(PROSE[:8])}


def datatrove(folder, kind: str) -> list:
    """By its own writers; every document has id, text and a dict of metadata."""
    pytest.importorskip("datatrove", reason="requirements-filters.txt is not installed")
    from datatrove.data import Document
    from datatrove.pipeline.writers import JsonlWriter, ParquetWriter

    writer = ParquetWriter(str(folder)) if kind == "parquet" else JsonlWriter(str(folder), compression=kind)
    with writer:
        for number, (key, text) in enumerate(TEXTS.items()):
            writer.write(Document(text=text, id=key, metadata={"url": "u", "dump": "d"}), rank=number % 2)
    return ["--input", folder, "--id-field", "id"]


def dolma(folder, kind: str) -> list:
    """https://github.com/allenai/dolma/blob/main/docs/data-format.md: JSON lines in files called .json.gz."""
    for part, half in enumerate((list(TEXTS)[:4], list(TEXTS)[4:])):
        records = (
            {"id": key, "text": TEXTS[key], "source": "common-crawl", "added": "a", "metadata": {"n": 1}}
            for key in half
        )
        lines = "".join(json.dumps(record) + "\n" for record in records)
        folder.mkdir(exist_ok=True)
        (folder / f"{part:04d}.json.gz").write_bytes(gzip.compress(lines.encode()))
    return ["--input", folder, "--id-field", "id", "--source-field", "source"]


def data_juicer(folder, kind: str) -> list:
    """Its export beside its statistics, which have no text: the file is named (data_juicer/core/exporter.py)."""
    folder.mkdir()
    records = [{"text": text, "meta": {"id": key}, "__dj__stats__": {"lang": "en"}} for key, text in TEXTS.items()]
    write_lines(folder / "processed_stats.jsonl", [{"__dj__stats__": {"lang": "en"}}] * len(records))
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(records), folder / "processed.parquet")
    else:
        write_lines(folder / "processed.jsonl", records)
    return ["--input", folder / f"processed.{kind}"]


def nemo_curator(folder, kind: str) -> list:
    """Data frames with the numbers that its deduplication adds, as pandas writes them."""
    folder.mkdir()
    numbers = range(len(TEXTS))
    frame = pandas.DataFrame({"text": TEXTS.values(), "file_name": "a.jsonl", "_curator_dedup_id": numbers})
    if kind == "parquet":
        frame.to_parquet(folder / "0c1d2e.parquet")
    else:
        frame.to_json(folder / "0c1d2e.jsonl", orient="records", lines=True, force_ascii=False)
    return ["--input", folder, "--id-field", "_curator_dedup_id"]


@pytest.mark.parametrize(
    ("tool", "kind"),
    [
        *((datatrove, kind) for kind in ("gzip", "zstd", "parquet")),
        (dolma, "gzip"),
        *((tool, kind) for tool in (data_juicer, nemo_curator) for kind in ("jsonl", "parquet")),
    ],
)
def test_what_they_write_is_read(tool, kind, tokenizer_folder, tokenizer, tmp_path, monkeypatch):
    words = [*tool(tmp_path / "written", kind), "--tokenizer", tokenizer_folder, "--output", tmp_path / "data"]
    monkeypatch.setattr("sys.argv", ["build", *map(str, words), "--seq-length", "128", "--workers", "1"])
    build.main()
    store = TokenStore.open(tmp_path / "data" / "tokens")
    assert sorted(tokenizer.decode(store.tokens(doc)) for doc in range(len(store))) == sorted(TEXTS.values())
    if tool in (datatrove, dolma):
        assert {store.key(doc) for doc in range(len(store))} == set(TEXTS)
    if tool is dolma:
        assert store.sources == ["common-crawl"]
