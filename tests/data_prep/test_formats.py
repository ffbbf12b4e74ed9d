"""Every file of a folder is read, to the last whole record before damage, or named."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import socket
import zlib
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from tests.data_prep.builds import left_out_of, read
from tests.data_prep.texts import awkward
from tests.properties import examples


def as_lines(texts: list[str]) -> list[bytes]:
    return [json.dumps({"text": text}, ensure_ascii=bool(i % 2)).encode() + b"\n" for i, text in enumerate(texts)]


def as_json(texts: list[str]) -> list[bytes]:
    *records, last = [json.dumps({"id": 1, "text": text}, indent=1).encode() for text in texts]
    return [b"[", *(record + b",\n" for record in records), last, b"]"]


def as_separated(texts: list[str], dialect: str) -> list[bytes]:
    rows = []
    for row in [("n", "text"), *enumerate(texts)]:
        file = io.StringIO()
        csv.writer(file, dialect, lineterminator="\n", quoting=csv.QUOTE_ALL).writerow(row)
        rows.append(file.getvalue().encode())
    return rows


def as_arrow(texts: list[str], new=pa.ipc.new_stream) -> bytes:
    sink = io.BytesIO()
    table = pa.table({"text": pa.array(texts, pa.large_string())})
    with new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue()


def as_parquet(texts: list[str]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"x": texts, "text": texts}), sink, row_group_size=3)
    return sink.getvalue()


IN_PIECES = {  # a piece a record, perhaps something before and after
    ".jsonl": as_lines,
    ".json": as_json,
    ".csv": lambda texts: as_separated(texts, "excel"),
    ".tsv": lambda texts: as_separated(texts, "excel-tab"),
}
LIKE = {".ndjson": ".jsonl", ".jsonlines": ".jsonl", ".parq": ".parquet", ".pq": ".parquet"}
TEXTS = (".txt", ".md", ".markdown")
TABLES = {
    ".parquet": as_parquet,
    ".arrow": as_arrow,
    ".feather": lambda texts: as_arrow(texts, pa.ipc.new_file),
}
KINDS = [*IN_PIECES, *LIKE, *TEXTS, *TABLES]


def content(kind: str, texts: list[str]) -> bytes:
    kind = LIKE.get(kind, kind)
    if kind in TEXTS:
        return texts[0].encode()
    return TABLES[kind](texts) if kind in TABLES else b"".join(IN_PIECES[kind](texts))


def as_zst(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


COMPRESS = {
    **dict.fromkeys((".gz", ".gzip"), lambda data: gzip.compress(data, mtime=0)),
    **dict.fromkeys((".zst", ".zstd"), as_zst),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
DECOMPRESS = {
    ".gz": lambda: zlib.decompressobj(31),
    ".zst": lambda: zstandard.ZstdDecompressor().decompressobj(),
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lzma.LZMADecompressor,
}


# --- folders ----------------------------------------------------------------------------------------------------------


def listening_socket(path: Path) -> None:
    place = os.open(path.parent, os.O_RDONLY)  # the address of a socket may be 107 bytes long
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(f"/proc/self/fd/{place}/{path.name}")
    os.close(place)


ODDITIES = {
    "FIFO": lambda path: os.mkfifo(path),
    "socket": listening_socket,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "link to nothing": lambda path: path.symlink_to("nowhere.jsonl"),
    "leads to itself": lambda path: path.symlink_to(path.name),
}
files = st.tuples(
    st.sampled_from(KINDS),
    st.sampled_from(["", "", *COMPRESS]),
    st.lists(awkward, min_size=1, max_size=6),
    st.booleans(),  # in two members, if compressed
    st.sampled_from(["", " é 中", os.fsdecode(b"\xff\xfe"), "_.x", "/sub"]),
    st.booleans(),  # in upper case
)
others = st.sampled_from([*ODDITIES, ".doc", ".jsonl.tar.gz", ".parquet.gz", "hidden", "hidden folder"])


def write_file(stem: Path, kind: str, compression: str, texts: list[str], halves: bool, upper: bool) -> None:
    data = content(kind, texts)
    if LIKE.get(kind, kind) in TABLES:
        compression = ""
    if compression:
        parts = (data[: len(data) // 2], data[len(data) // 2 :]) if halves else (data,)
        data = b"".join(COMPRESS[compression](part) for part in parts)
    suffix = kind + compression
    path = stem.with_name(stem.name + (suffix.upper() if upper else suffix))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)


def write_other(folder: Path, name: str, kind: str) -> tuple[Path, int]:
    """What is not read, and the bytes that are named with it."""
    if kind == "hidden folder":
        (folder / f".{name}").mkdir()
        (folder / f".{name}" / "a.txt").write_text("some words")
        return folder / f".{name}", 10
    path = folder / (f"{name}{kind}" if kind.startswith(".") else f"{'.' * (kind == 'hidden')}{name}.jsonl")
    if make := ODDITIES.get(kind):
        make(path)
        return path, 0
    path.write_text("some words")
    return path, 10


@examples(60)
@given(st.lists(st.one_of(files, others), min_size=1, max_size=8), st.one_of(st.none(), st.integers(50, 1000)))
def test_every_file_of_a_folder_is_read_or_named(entries, unit_bytes):
    expected, named = ["the first"], {}
    with TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "0.txt").write_text("the first")
        (folder / "1-link.txt").symlink_to("0.txt")
        (folder / "2-loop").symlink_to(folder)
        for number, entry in enumerate(entries, start=10):
            if isinstance(entry, str):
                path, size = write_other(folder, str(number), entry)
                named[str(path)] = size
                continue
            kind, compression, texts, halves, flavour, upper = entry
            write_file(folder / f"{number}{flavour}", kind, compression, texts, halves, upper)
            expected += [texts[0].removeprefix("\ufeff")] if kind in TEXTS else texts
        documents, problems = read(folder, unit_bytes=unit_bytes)
        left_out = left_out_of(folder)
    assert [document.text for document in documents] == expected
    assert len({document.key for document in documents}) == len(documents)
    assert {entry.path: entry.size for entry in left_out} == named
    assert (problems.count, problems.left_out) == (0, [])


@pytest.mark.parametrize("kind", [*ODDITIES, ".doc", ".jsonl.tar.gz"])
def test_a_file_that_is_named_on_the_command_line_must_be_readable(tmp_path, kind):
    path, _ = write_other(tmp_path, "a", kind)
    words = kind if kind in ODDITIES else "none of the known suffixes"
    with pytest.raises(ValueError, match=f"{path} cannot be read as documents: .*{words}"):
        read(path)
    with pytest.raises(ValueError, match=f"holds no new document files.*{words}"):
        read(tmp_path)


def test_a_saved_datasets_folder_lacks_a_file(tmp_path):
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "a.arrow"}]}))
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "b.arrow").write_bytes(as_arrow(["x"]))
    with pytest.raises(ValueError, match=r"state.json lists a.arrow, which is not there"):
        read(tmp_path)
    (tmp_path / "a.arrow").write_bytes(as_arrow(["y"]))
    assert [document.text for document in read(tmp_path)[0]] == ["y"]
    assert {Path(entry.path).name for entry in left_out_of(tmp_path)} == {"b.arrow", "state.json", "dataset_info.json"}


# --- damage -----------------------------------------------------------------------------------------------------------


def given_by(decoder, data: bytes) -> bytes:
    """What a decompressor gives of members of which the last may be cut."""
    out = b""
    while data:
        member = decoder()
        out += member.decompress(data)
        data = member.unused_data if member.eof else b""
    return out


@examples(200)
@given(
    st.sampled_from(sorted(DECOMPRESS)),
    st.sampled_from(sorted(IN_PIECES)),
    st.lists(st.text("ab \n", max_size=300) | awkward, min_size=2, max_size=30),
    st.integers(0, 2**16),
    st.one_of(st.none(), st.integers(0, 7)),
)
def test_damage_loses_nothing_that_stands_before_it(suffix, kind, texts, place, bit):
    """Cut (no bit), or with one bit flipped, at any offset, in either of two members."""
    pieces = IN_PIECES[kind](texts)
    half = len(pieces) // 2
    data = b"".join(COMPRESS[suffix](b"".join(part)) for part in (pieces[:half], pieces[half:]))
    offset = place % len(data)
    damaged = bytearray(data[:offset] if bit is None else data)
    if bit is not None:
        damaged[offset] ^= 1 << bit
    before = len(given_by(DECOMPRESS[suffix], data[:offset]))
    ends = list(accumulate(map(len, pieces)))[len(pieces) - len(texts) - (kind == ".json") :]
    whole = sum(end <= before for end in ends[: len(texts)])
    with TemporaryDirectory() as folder:
        path = Path(folder, f"a{kind}{suffix}")
        path.write_bytes(damaged)
        documents, problems = read(path, on_error="skip")
    found = [document.text for document in documents]
    assert found[:whole] == texts[:whole]
    member_ends = {0, len(data)} | ({len(COMPRESS[suffix](b"".join(pieces[:half])))} if bit is None else set())
    if found != texts and offset not in member_ends:
        assert problems.count or problems.left_out
    assert all(entry.path == str(path) and 0 <= entry.size <= len(damaged) for entry in problems.left_out)
    assert bool(problems.left_out) >= any(reason.startswith("damaged") for reason in problems.reasons)


@pytest.mark.parametrize("suffix", sorted(DECOMPRESS))
def test_where_damage_is_said_to_be(tmp_path, suffix):
    texts = [f"{number} {'words ' * (number % 9)}" for number in range(2000)]
    data = COMPRESS[suffix](content(".jsonl", texts))
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(data[: len(data) * 2 // 3])
    lines = given_by(DECOMPRESS[suffix], data[: len(data) * 2 // 3]).count(b"\n")
    with pytest.raises(ValueError, match=f"line {lines + 1}: damaged compressed file, rest unreadable .it ends in the"):
        read(path)
    documents, problems = read(path, on_error="skip")
    assert [document.text for document in documents] == texts[:lines]
    assert problems.reasons == {"damaged compressed file, rest unreadable": 1}


@pytest.mark.parametrize("suffix", sorted(DECOMPRESS))
def test_what_follows_complete_compressed_data(tmp_path, suffix):
    """Zeros are padding, anything else is a warning; but another member further on shows that it is damage."""
    texts, more = ["one", "two"], ["three"]
    path = tmp_path / f"a.jsonl{suffix}"
    first, second = (COMPRESS[suffix](content(".jsonl", part)) for part in (texts, more))
    for between, end, found, left_out, count in (
        (b"", second, texts + more, [], 0),
        (b"\0" * 1000, second, texts + more, [], 0),
        (b"\0" * 1000, b"", texts, [], 0),
        (b"\0\0garbage", b"", texts, [7], 0),
        (b"garbage", second, texts, [7 + len(second)], 1),
    ):
        path.write_bytes(first + between + end)
        documents, problems = read(path, on_error="skip")
        assert [document.text for document in documents] == found
        assert [entry.size for entry in problems.left_out] == left_out
        assert problems.count == count
    path.write_bytes(first + b"x")
    assert len(read(path, on_error="fail")[0]) == 2


def test_frames_of_zstd(tmp_path):
    """Any window that `zstd --long=31` makes, empty frames, and frames to be skipped."""
    line = content(".jsonl", ["far"])
    raw_block = (len(line) << 3 | 1).to_bytes(3, "little") + line
    longest = b"\x28\xb5\x2f\xfd" + b"\0" + bytes([31 - 10 << 3]) + raw_block
    skipped = b"\x5a\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"hello"
    (tmp_path / "a.jsonl.zst").write_bytes(skipped + as_zst(b"") + longest + skipped + as_zst(line) + skipped)
    assert [document.text for document in read(tmp_path)[0]] == ["far", "far"]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("compression", ["", ".gz"])
def test_other_encodings_are_told_by_their_mark(tmp_path, encoding, compression):
    texts = ["é", "中 \n", "\U0010ffff"]
    compress = COMPRESS.get(compression, bytes)
    for kind in (".jsonl", ".csv", ".json"):
        data = ("\ufeff" + content(kind, texts).decode()).encode(encoding)
        (tmp_path / f"a{kind}{compression}").write_bytes(compress(data))
        documents, _ = read(tmp_path / f"a{kind}{compression}", unit_bytes=10)
        assert [document.text for document in documents] == texts
        (tmp_path / f"b{kind}{compression}").write_bytes(compress(data + b"\0"))
        with pytest.raises(ValueError, match="invalid UTF-"):
            read(tmp_path / f"b{kind}{compression}")


def test_a_name_may_be_wrong_about_compression(tmp_path):
    lines = content(".jsonl", ["x"])
    for name, data in (("a.jsonl", gzip.compress(lines)), ("b.jsonl.gz", lines), ("c.jsonl.zst", bz2.compress(lines))):
        (tmp_path / name).write_bytes(data)
    assert [document.text for document in read(tmp_path, unit_bytes=5)[0]] == ["x"] * 3
