"""A field of the records may name their source: each of its values is then a source, as if the user had divided the files."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.build import build
from data_prep.options import BuildOptions
from data_prep.plan import Plan
from data_prep.repack import repack
from data_prep.sources import parse_sources
from data_prep.store import TokenStore
from data_prep.tokenizer import open_tokenizer
from data_prep.verify import problems
from storage.manifest import PackingPolicy, read_manifest
from storage.shards import open_split
from tests.data_prep.builds import arguments, build_here, contents, failure, run
from tests.data_prep.texts import PROSE, write_lines

FIELD = {"source_field": "domain", "unit_bytes": 40_000}
RECORDS = [{"text": text, "domain": f"part{number % 3}", "id": number} for number, text in enumerate(PROSE)]


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    path = tmp_path_factory.mktemp("lines") / "all.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


@pytest.fixture(scope="module")
def by_field(lines, tokenizer_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("data") / "by_field"
    build_here([lines], tokenizer_folder, output, validation_fraction=0.2, **FIELD)
    return output


def rows_of(data, split: str) -> dict[str, np.ndarray]:
    dataset = open_split(data, split)
    counts = dataset.rows_per_source
    return {name: np.stack([dataset.row(name, row).ids for row in range(counts[name])]) for name in dataset.sources}


def test_rows_are_those_of_files_divided_by_hand(lines, tokenizer_folder, tmp_path):
    opened, named = open_tokenizer(tokenizer_folder), []
    for part in ("part0", "part1", "part2"):
        file = tmp_path / f"{part}.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in RECORDS if record["domain"] == part))
        named.append(f"{part}={file}")
    options = BuildOptions(packing=PackingPolicy(seq_length=128), validation_fraction=0)
    build(Plan(parse_sources([], named), options, opened), opened, tmp_path / "by_hand")
    build_here([lines], tokenizer_folder, tmp_path / "by_field", validation_fraction=0, **FIELD)
    mine, theirs = (rows_of(tmp_path / name, "train") for name in ("by_field", "by_hand"))
    assert list(mine) == list(theirs) == ["part0", "part1", "part2"]
    for part, rows in theirs.items():
        np.testing.assert_array_equal(mine[part], rows)


def test_documents_are_in_the_source_that_they_name(by_field):
    store = TokenStore.open(by_field / "tokens")
    assert [store.source(doc) for doc in range(len(store))] == [record["domain"] for record in RECORDS]
    manifest = read_manifest(by_field)
    parts = ["part0", "part1", "part2"]
    assert {split: sorted(sources) for split, sources in manifest.splits.items()} == {
        "train": parts,
        "validation": parts,
    }
    counted = sum(entry.documents for sources in manifest.splits.values() for entry in sources.values())
    assert counted == len(RECORDS)
    assert [problem for _, problem in problems(by_field, full=True) if problem] == []


def test_workers_and_formats_do_not_show(by_field, lines, tokenizer_folder, tmp_path):
    done = run(
        "build",
        *arguments(lines, tokenizer_folder, tmp_path / "two", "--workers", 2),
        "--source-field",
        "domain",
        "--validation-fraction",
        "0.2",
    )
    assert done.returncode == 0, done.stderr
    columns = {name: [record[name] for record in RECORDS] for name in RECORDS[0]}
    pq.write_table(pa.table(columns), tmp_path / "all.parquet", row_group_size=20)
    build_here([tmp_path / "all.parquet"], tokenizer_folder, tmp_path / "table", validation_fraction=0, **FIELD)
    build_here([lines], tokenizer_folder, tmp_path / "lines", validation_fraction=0, **FIELD)
    first, second = (rows_of(tmp_path / name, "train") for name in ("table", "lines"))
    for part, rows in second.items():
        np.testing.assert_array_equal(first[part], rows)
    store = TokenStore.open(tmp_path / "two" / "tokens")
    assert [store.source(doc) for doc in range(len(store))] == [record["domain"] for record in RECORDS]


def test_it_can_be_packed_again(by_field, tmp_path):
    repack(by_field, read_manifest(by_field).packing, tmp_path / "same")
    for split in ("train", "validation"):
        mine, theirs = rows_of(tmp_path / "same", split), rows_of(by_field, split)
        assert all(np.array_equal(mine[part], theirs[part]) for part in theirs)
    assert {
        name: digest for name, digest in contents(tmp_path / "same").items() if "unit-" in name and "arrow" in name
    } == {name: digest for name, digest in contents(by_field).items() if "unit-" in name and "arrow" in name}


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"text": "x"}, "all.jsonl line 1: field 'domain' names no source (it is missing)"),
        ({"text": "x", "domain": "a/b"}, "field 'domain' names no source ('a/b': a name has letters"),
        ({"text": "x", "domain": "all"}, "field 'domain' names no source ('all': a name has letters"),
        ({"text": "x", "domain": True}, "field 'domain' names no source ('True'"),
    ],
)
def test_a_record_without_a_source_is_said(tokenizer_folder, tmp_path, record, sentence):
    (tmp_path / "all.jsonl").write_text(json.dumps(record) + "\n" + json.dumps(RECORDS[0]) + "\n")
    with pytest.raises(ValueError) as error:
        build_here([tmp_path / "all.jsonl"], tokenizer_folder, tmp_path / "data", **FIELD)
    assert sentence in str(error.value)
    words = {"on_error": "skip", "validation_fraction": 0, "tail": "pad"}
    assert build_here([tmp_path / "all.jsonl"], tokenizer_folder, tmp_path / "data", **words, **FIELD).splits[
        "train"
    ].keys() == {"part0"}


def test_what_has_no_fields_or_two_names_is_refused(tokenizer_folder, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"a text file has no fields \(see --source-field\)"):
        build_here([tmp_path / "a.txt"], tokenizer_folder, tmp_path / "data", **FIELD)
    write_lines(tmp_path / "b.jsonl", PROSE[:3])
    done = run(
        "build",
        "--source",
        f"a={tmp_path / 'b.jsonl'}",
        "--tokenizer",
        tokenizer_folder,
        "--output",
        tmp_path / "c",
        "--seq-length",
        64,
        "--source-field",
        "domain",
    )
    assert "--source-field names the sources by itself: give the files with --input" in failure(done)
