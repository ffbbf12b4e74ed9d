"""The manifest of a prepared data set: what it holds, how it was made, and the fingerprint that identifies it.

`manifest.json` is written last and atomically, so a folder without one is not a data set. Its fingerprint is the
SHA-256 of the canonical JSON of everything in it except the creation time, where it was packed again from, what of the
input was left out, and itself; because the hashes of inputs, tokenizer and shards are part of that JSON, another byte
anywhere is another fingerprint.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints, ValidationError, model_validator

from storage.atomic import write_atomically

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
CUT_TOLERANCE = 0.0625
NOT_FINGERPRINTED = frozenset({"created_at", "repacked_from", "left_out", "fingerprint"})

SourceName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]


def _is_absent(value: Any) -> bool:
    """What no earlier data set has is not written where it says nothing: those stay as they are, byte for byte."""
    return value is None or value is False


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)


class PackingPolicy(Record):
    """How documents become rows of `seq_length + 1` tokens."""

    policy: Literal["bestfit", "concat"] = "bestfit"
    """bestfit: documents that fit are never cut; concat: one stream of tokens cut at fixed length."""
    seq_length: int = Field(ge=1)
    """Tokens the model sees at once; a row holds one more, so that every input has a target."""
    overlap: int = Field(default=1, ge=1)
    """Tokens repeated as context at the start of each further window of a document longer than a row (bestfit)."""
    cut: Literal["exact", "structure"] = "exact"
    """Where documents longer than a row are cut (bestfit): exact: when a row is full; structure: at the last end of a
    paragraph, else a line, else a sentence, that lies within cut_tolerance of that."""
    cut_tolerance: float | None = Field(default=None, gt=0, lt=1)
    """Share of a row by which a window may end earlier to end with the text (cut structure, there 0.0625 if not given)."""
    tail: Literal["pad", "drop"] = "pad"
    """The incomplete last row: pad it, or drop it (its tokens are counted as dropped)."""

    @model_validator(mode="after")
    def _overlap_leaves_progress(self) -> "PackingPolicy":
        if self.overlap > self.seq_length:
            raise ValueError(f"overlap {self.overlap} must not exceed seq_length {self.seq_length}")
        if self.policy == "concat" and self.overlap != 1:
            raise ValueError(f"overlap {self.overlap} has no effect with policy concat: leave it at 1")
        return self

    @model_validator(mode="before")
    @classmethod
    def _fill_cut_tolerance(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and fields.get("cut") == "structure" and fields.get("cut_tolerance") is None:
            return fields | {"cut_tolerance": CUT_TOLERANCE}
        return fields

    @model_validator(mode="after")
    def _cut_has_an_effect(self) -> "PackingPolicy":
        if self.cut == "structure":
            if self.policy == "concat":
                raise ValueError("cut structure has no effect with policy concat: use bestfit")
            if self.overlap + self.cut_tolerance_tokens > self.seq_length:
                raise ValueError(
                    f"overlap {self.overlap} and a cut_tolerance of {self.cut_tolerance_tokens} tokens leave nothing of "
                    f"seq_length {self.seq_length}: make one of them smaller"
                )
        elif self.cut_tolerance is not None:
            raise ValueError(f"cut_tolerance {self.cut_tolerance} has no effect with cut exact: use cut structure")
        return self

    @property
    def row_tokens(self) -> int:
        return self.seq_length + 1

    @property
    def cut_tolerance_tokens(self) -> int:
        return int((self.cut_tolerance or 0) * self.row_tokens)


class TokenizerInfo(Record):
    type: Literal["sentencepiece", "huggingface"]
    file: str
    """Path of the tokenizer file inside the data set."""
    sha256: Sha256
    vocab_size: int = Field(ge=1)
    bos_id: int | None
    eos_id: int | None
    pad_id: int
    """Fills the end of rows; never a target."""
    mask_id: int | None

    @property
    def control_ids(self) -> list[int]:
        """Those of BOS, EOS, padding and mask that there are, ascending."""
        ids = (self.bos_id, self.eos_id, self.pad_id, self.mask_id)
        return sorted({number for number in ids if number is not None})


class Shard(Record):
    file: str
    """Path inside the data set."""
    rows: int = Field(ge=1)
    bytes: int = Field(ge=1)
    sha256: Sha256
    min_id: Count
    max_id: Count


class SourceRows(Record):
    """One source within one split."""

    documents: Count
    bytes: Count
    """UTF-8 bytes of the documents' text."""
    tokens: Count
    """Tokens of the documents, BOS and EOS included."""
    rows: Count
    targets: Count
    """Positions that carry loss when every row is seen once."""
    target_bytes: Annotated[Count | None, Field(exclude_if=_is_absent)] = None
    """UTF-8 bytes of the text that carries loss, where only a part of it does."""
    weight: Annotated[float, Field(ge=0)] | None = None
    """Share of the samples relative to the other sources; none for all sources: in proportion to their rows."""
    shards: list[Shard]

    @property
    def shards_hash(self) -> str:
        """By which a file beside the shards knows those that it was made from."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.shards).encode()).hexdigest()

    @model_validator(mode="after")
    def _shards_add_up(self) -> "SourceRows":
        if sum(shard.rows for shard in self.shards) != self.rows:
            raise ValueError("the rows of the shards do not add up to the rows of the source")
        if len({shard.rows for shard in self.shards[:-1]}) > 1:
            raise ValueError("every shard of a source except its last must hold the same number of rows")
        return self


class LeftOutFiles(Record):
    """What of the input was not read, for one reason."""

    files: Count
    bytes: Count
    names: list[str]
    """The first of them."""


class Manifest(Record):
    format_version: int = FORMAT_VERSION
    created_at: str
    created_by: dict[str, str]
    """Versions of the programs that made the data set."""
    repacked_from: Sha256 | None = None
    """Fingerprint of the data set whose token store was packed again, if one was."""
    inputs: dict[SourceName, Sha256]
    """Per source, the hash of its input files (contents, not places)."""
    tokenizer: TokenizerInfo
    tokenizer_files: dict[str, Sha256] = {}
    """Hashes of the files beside the tokenizer's own that belong to it, such as its chat template."""
    dtype: Literal["uint16", "uint32"]
    packing: PackingPolicy
    target_spans: Annotated[bool, Field(exclude_if=_is_absent)] = False
    """Rows have a column that says which of their tokens carry loss."""
    seed: Count
    splits: dict[str, dict[SourceName, SourceRows]]
    statistics: dict[str, JsonValue] = {}
    left_out: dict[str, LeftOutFiles] = {}
    """By reason, files (and ends of files) of the input that were not read."""
    fingerprint: str = ""

    @property
    def seq_length(self) -> int:
        return self.packing.seq_length

    @model_validator(mode="after")
    def _consistent(self) -> "Manifest":
        if self.dtype != token_dtype(self.tokenizer.vocab_size):
            raise ValueError(f"dtype {self.dtype} does not belong to a vocabulary of {self.tokenizer.vocab_size}")
        for sources in self.splits.values():
            if len({source.weight is None for source in sources.values()}) > 1:
                raise ValueError("give a weight to every source or to none")
            for shard in (shard for source in sources.values() for shard in source.shards):
                if shard.max_id >= self.tokenizer.vocab_size:
                    raise ValueError(
                        f"{shard.file} holds token id {shard.max_id}, outside the tokenizer's vocabulary "
                        f"of {self.tokenizer.vocab_size}"
                    )
        return self


def token_dtype(vocab_size: int) -> Literal["uint16", "uint32"]:
    """The narrowest type for ids 0 .. vocab_size - 1: uint16 up to and including 65,536 entries."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def file_sha256(path: Path) -> str:
    """Of all bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(content: dict[str, Any]) -> str:
    """SHA-256 of the canonical JSON (sorted keys, no spaces) of a manifest without NOT_FINGERPRINTED."""
    hashed = {key: value for key, value in content.items() if key not in NOT_FINGERPRINTED}
    return hashlib.sha256(
        json.dumps(hashed, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    ).hexdigest()


def save_manifest(directory: Path, manifest: Manifest) -> Manifest:
    """Write `manifest.json` atomically; return the manifest with its fingerprint."""
    content = manifest.model_dump(mode="json")
    content["fingerprint"] = fingerprint(content)
    write_atomically(Path(directory) / MANIFEST_FILE, json.dumps(content, indent=1).encode() + b"\n")
    return Manifest.model_validate(content)


def write_datasets_index(
    directory: Path, manifest: Manifest, segment_columns: dict[str, str], span_column: str | None = None
) -> None:
    """The JSON files by which `datasets.load_from_disk` opens a split, or all of them, in place.

    `span_column`: a list of pairs of int32, the last column.
    """
    ids = {
        "feature": {"dtype": manifest.dtype, "_type": "Value"},
        "length": manifest.packing.row_tokens,
        "_type": "List",
    }
    segments: dict[str, Any] = {
        name: {"feature": {"dtype": kind, "_type": "Value"}, "_type": "List"} for name, kind in segment_columns.items()
    }
    if span_column:
        pair = {"feature": {"dtype": "int32", "_type": "Value"}, "length": 2, "_type": "List"}
        segments[span_column] = {"feature": pair, "_type": "List"}
    info = {"description": "", "citation": "", "homepage": "", "license": "", "features": {"input_ids": ids} | segments}
    filled = [split for split, sources in manifest.splits.items() if any(entry.rows for entry in sources.values())]
    for split in filled:
        shards = [shard for _, entry in sorted(manifest.splits[split].items()) for shard in entry.shards]
        state: dict[str, Any] = {
            "_data_files": [{"filename": Path(shard.file).name} for shard in shards],
            "_fingerprint": hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest()[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": split,
        }
        for name, content in (("state.json", state), ("dataset_info.json", info)):
            write_atomically(Path(directory) / split / name, json.dumps(content, indent=1).encode())
    write_atomically(Path(directory) / "dataset_dict.json", json.dumps({"splits": filled}).encode())


def read_manifest(directory: Path) -> Manifest:
    """Read and check `manifest.json`; a `ValueError` says in one sentence why it cannot be trusted."""
    path = Path(directory) / MANIFEST_FILE
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(directory)):
            advice = (
                "is a URL, where a folder of this machine is needed (`python -m tools.pull URL FOLDER` makes one of it)"
            )
        else:
            advice = (
                f"is not a prepared data set: it has no {MANIFEST_FILE} "
                "(run `python -m data_prep.build`; after an interruption the same command continues)"
            )
        raise ValueError(f"{directory} {advice}") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}): build the data set again") from None
    if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
        version = content.get("format_version") if isinstance(content, dict) else None
        raise ValueError(f"{path} has format version {version}, this program reads {FORMAT_VERSION}")
    if content.get("fingerprint") != fingerprint(content):
        raise ValueError(f"{path} was changed after it was written: its fingerprint does not match its content")
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "manifest"
        raise ValueError(f"{path}: {place}: {first['msg'].removeprefix('Value error, ')}") from None
