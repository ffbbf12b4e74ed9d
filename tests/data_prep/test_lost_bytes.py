"""What damage takes from a file is counted, in bytes of that file, or said to be uncountable: never a silent loss."""

import bz2
import codecs
import gzip
import json
import lzma
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from storage.manifest import read_manifest
from tests.data_prep.builds import build_here, read

TEXTS = [f"{number} {random.Random(number).randbytes(30).hex()}" for number in range(60)]
COMPRESS = {".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
CUT = "cut off in compressed data (what is missing cannot be counted, only what is there and gives nothing)"
UNPROVEN = "behind damage in compressed data (what was read since its last checksum may be wrong)"
IN_GROUPS = "in row groups that are not read whole (their bytes of the columns that are read)"
IN_BATCHES = "in record batches that are damaged, or behind these"
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def lost(path: Path) -> list[tuple[str, int]]:
    """Reason and bytes of what is left out of a file, and the documents before it, checked to be those that stand there."""
    documents, problems = read(path, on_error="skip")
    found = [document.text for document in documents]
    assert [text for text in TEXTS if text in found] == found
    assert {entry.path for entry in problems.left_out} <= {str(path)}
    return [(entry.reason, entry.size) for entry in problems.left_out]


@pytest.mark.parametrize("suffix", sorted(COMPRESS))
def test_of_a_cut_file_the_end_is_named(tmp_path, suffix):
    """Whatever still stands there and gives nothing is counted; at most a block of what is read at a time is not."""
    data, path = COMPRESS[suffix](LINES), tmp_path / f"a.jsonl{suffix}"
    for end in (len(data) - 1, len(data) * 2 // 3, 12):
        path.write_bytes(data[:end])
        ((reason, size),) = lost(path)
        assert reason == CUT
        assert 0 <= size <= end
        if end == 12 or (suffix == ".bz2" and end < len(data) - 1):  # one block, which gives all or nothing
            assert size == end


@pytest.mark.parametrize("suffix", sorted(COMPRESS))
def test_what_stands_behind_damage_is_counted_from_the_last_byte_that_gave_data(tmp_path, suffix):
    path, middle = tmp_path / f"a.jsonl{suffix}", LINES.index(b"\n", len(LINES) // 2) + 1
    first, second = COMPRESS[suffix](LINES[:middle]), bytearray(COMPRESS[suffix](LINES[middle:]))
    place = {".gz": 10, ".zst": 4}.get(
        suffix, len(second) // 2
    )  # headers: these two check their content at the end only
    second[place] |= 0x0F
    path.write_bytes(first + second)
    ((reason, size),) = lost(path)
    assert reason == (UNPROVEN if suffix == ".xz" else "behind damage in compressed data")
    assert (0 < size <= len(second)) if suffix == ".xz" else (size == len(second))


def test_a_wrong_record_before_a_checksum_is_not_kept_in_silence(tmp_path):
    path, data = tmp_path / "a.jsonl.gz", bytearray(gzip.compress(LINES, compresslevel=0))
    data[data.index(TEXTS[30].encode())] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"line 61: damaged .*, some of what was read perhaps wrong .*data check"):
        read(path)
    documents, problems = read(path, on_error="skip")
    assert [number for number, text in enumerate(TEXTS) if documents[number].text != text] == [30]
    assert [(entry.reason, entry.size) for entry in problems.left_out] == [(UNPROVEN, 8)]


def test_of_parquet_the_row_groups(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"other": TEXTS, "text": TEXTS, "text.more": TEXTS})
    pq.write_table(table, path, row_group_size=20, use_dictionary=False, write_page_checksum=True)
    column = pq.ParquetFile(path).metadata.row_group(1).column(1)
    data = bytearray(path.read_bytes())
    begin = column.data_page_offset
    data[begin + column.total_compressed_size - 9] ^= 1
    path.write_bytes(data)
    assert lost(path) == [(IN_GROUPS, column.total_compressed_size)]
    documents, problems = read(path, on_error="skip", unit_bytes=1)
    assert [document.text for document in documents] == TEXTS[:20] + TEXTS[40:]
    assert [entry.size for entry in problems.left_out] == [column.total_compressed_size]


def batches(path: Path) -> list[int]:
    """Writes the texts in record batches of 10; returns where each begins, and where the last ends."""
    table = pa.table({"text": TEXTS})
    with (pa.ipc.new_stream if path.suffix == ".arrow" else pa.ipc.new_file)(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=10)
    with pa.memory_map(str(path)) as opened:
        opened.seek(8 * (path.suffix == ".feather"))
        stream = pa.ipc.open_stream(opened)
        places = [opened.tell()]
        for _ in stream:
            places.append(opened.tell())
    return places


@pytest.mark.parametrize("suffix", [".arrow", ".feather"])
def test_of_arrow_the_record_batches(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    places = batches(path)
    assert len(places) == 7
    whole = path.read_bytes()
    unknown = f"{IN_BATCHES} (what is missing at the end cannot be counted)"
    path.write_bytes(whole[: places[3] + 100])
    assert lost(path) == [(unknown, 100)]
    path.write_bytes(whole[: places[3]])
    assert lost(path) == [(unknown, 0)]
    damaged = bytearray(whole)
    damaged[places[3] : places[3] + 16] = b"\x55" * 16
    path.write_bytes(damaged)
    assert lost(path) == [(IN_BATCHES, len(whole) - places[3])]
    damaged[places[3] : places[4]] = bytes(places[4] - places[3])  # a hole reads as the end of the stream
    path.write_bytes(damaged)
    assert lost(path) == [(IN_BATCHES, len(whole) - places[3])]
    damaged = bytearray(whole)
    flipped = whole.index(b"\0" * 4 + len(TEXTS[30]).to_bytes(4, "little"), places[3]) + 7
    damaged[flipped] ^= 0x40  # an offset into the text, far outside
    path.write_bytes(damaged)
    assert lost(path) == [(IN_BATCHES, places[4] - places[3])]
    assert len(read(path, on_error="skip")[0]) == 50


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-32-be"])
def test_of_another_encoding_what_is_no_text(tmp_path, encoding, suffix):
    """Before it everything is read, to the last whole line."""
    path = tmp_path / f"a.jsonl{suffix}"
    text = "\ufeff" + LINES.decode()
    middle = text.index(TEXTS[30])
    bad = {"utf-16-le": b"", "utf-32-be": b"\0\x7f\0\0"}[encoding]
    data = text[:middle].encode(encoding) + (bad + text[middle:].encode(encoding) if bad else b"x")
    path.write_bytes(gzip.compress(data) if suffix else data)
    with pytest.raises(ValueError, match=rf"line 31: invalid {encoding[:6].upper()}, rest unreadable"):
        read(path)
    words = f"behind invalid {encoding[:6].upper()}" + (" (bytes after decompression)" if suffix else "")
    assert lost(path) == [(words, len(data) - len(text[:middle].encode(encoding)))]
    assert len(read(path, on_error="skip")[0]) == 30


def test_of_separated_values_and_lists_the_text(tmp_path):
    rows = [f'"{text}"\n' for text in TEXTS]
    bad = b'"x"y\n'
    data = "".join(["text\n", *rows[:30]]).encode() + bad + "".join(rows[30:]).encode() + bad
    (path := tmp_path / "a.csv").write_bytes(data)
    assert lost(path) == [("invalid CSV", 5)] * 2
    (path := tmp_path / "a.csv.gz").write_bytes(gzip.compress(data))
    assert lost(path) == [("invalid CSV (bytes of text, as UTF-8)", 5)] * 2
    (path := tmp_path / "a.json").write_bytes(b'[{"text": "' + TEXTS[0].encode() + b'"}, nonsense]')
    assert lost(path) == [("behind damage in JSON", len(", nonsense]"))]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "txt"])
def test_a_file_without_a_whole_record_is_left_out_as_a_whole_and_once(tmp_path, kind):
    path = tmp_path / f"a.{kind}.gz"
    path.write_bytes(gzip.compress(b'{"text": "' + TEXTS[0].encode() * 9)[:-3])
    assert lost(path) == [(CUT, path.stat().st_size)]
    if kind == "txt":
        path.write_bytes(gzip.compress(b"\xff\n" * 90)[:-3])
        assert lost(path) == [("invalid UTF-8", path.stat().st_size)]


def test_all_of_it_is_in_the_manifest_each_file_once(tmp_path, tokenizer_folder):
    folder = tmp_path / "documents"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(LINES)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(LINES)[:-9])
    (folder / "c.csv").write_text('text\n"x"y\n' + f'"{TEXTS[0]}"\n' + '"x"y\n')
    places = batches(folder / "d.arrow")
    (folder / "d.arrow").write_bytes((folder / "d.arrow").read_bytes()[: places[3] + 100])
    (folder / "e.jsonl").write_bytes(codecs.BOM_UTF16_LE + LINES.decode().encode("utf-16-le") + b"x")
    build_here([folder], tokenizer_folder, tmp_path / "data", on_error="skip")
    found = {Path(e.names[0]).name: (e.files, e.bytes) for e in read_manifest(tmp_path / "data").left_out.values()}
    assert found == {"b.jsonl.gz": (1, 0), "c.csv": (1, 10), "d.arrow": (1, 100), "e.jsonl": (1, 1)}
