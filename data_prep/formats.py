"""What a file holds: by the end of its name, and by its first bytes where the two disagree."""

import codecs
import re
from pathlib import PurePath

KINDS = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".jsonlines": "lines",
    ".json": "json",
    ".txt": "text",
    ".md": "text",
    ".markdown": "text",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".parq": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
COMPRESSIONS = {".gz": "gz", ".gzip": "gz", ".zst": "zst", ".zstd": "zst", ".bz2": "bz2", ".xz": "xz"}
TABLES = ("parquet", "arrow")
KNOWN = f"{' '.join(KINDS)}, all but tables also with {' '.join(COMPRESSIONS)}"
SIGNATURES = {
    "gz": re.compile(rb"\x1f\x8b\x08[\x00-\x1f]"),
    "zst": re.compile(rb"\x28\xb5\x2f\xfd"),
    "bz2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
    "xz": re.compile(rb"\xfd7zXZ\x00"),
}
SKIPPABLE_FRAME = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")
"""May stand between the frames of a .zst file; elsewhere it could be text."""
ENCODINGS = {  # the longer marks first: one of UTF-32 begins with one of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
HEAD_BYTES = 512
UNKNOWN = "none of the known suffixes"
HIDDEN = "hidden"
UNLISTED = "no data file of the saved `datasets` folder"
OURS = "a data set of this program"
DATASETS_MARKS = {"state.json", "dataset_info.json"}
OUR_MARKS = ({"plan.json", ".lock"}, {"manifest.json", "dataset_dict.json"})
"""Either is in every data set that this program makes, the first also in an unfinished one."""


def file_format(name: str) -> str | None:
    """The format that a name promises, such as "lines", "lines.gz" or "parquet"; None: an unknown one."""
    *_, before, suffix = ["", "", *PurePath(name.lower()).suffixes]
    compression = COMPRESSIONS.get(suffix)
    kind = KINDS.get(before if compression else suffix)
    if compression is None or kind is None:
        return kind
    return None if kind in TABLES else f"{kind}.{compression}"


def compression_of(head: bytes, promised: str | None) -> str | None:
    """The compression of a file that begins with `head`, whatever its name promised; None: it is plain."""
    for name, signature in SIGNATURES.items():
        if signature.match(head):
            return name
    return promised if promised and head and not _is_text(head) else None


def _is_text(head: bytes) -> bool:
    if encoding_of(head):
        return True
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return not SKIPPABLE_FRAME.match(head)


def encoding_of(head: bytes) -> str | None:
    """The encoding, other than UTF-8, that a byte order mark names."""
    return next((encoding for mark, encoding in ENCODINGS.items() if head.startswith(mark)), None)
