"""Is a shard the one that its manifest describes?"""

from pathlib import Path
from stat import S_ISREG

import pyarrow as pa

from storage.manifest import Manifest, Shard, file_sha256
from storage.mapped import map_stream
from storage.rows import rows_per_batch, shard_schema


def shard_identity(split: str, source: str, number: int) -> dict[str, str]:
    """The metadata by which a shard knows its own place, so that exchanged files are noticed."""
    return {"split": split, "source": source, "shard": str(number)}


def manifest_schema(manifest: Manifest) -> pa.Schema:
    """Of the shards of a data set."""
    return shard_schema(manifest.packing.row_tokens, manifest.dtype, target_spans=manifest.target_spans)


def shard_problem(path: Path, shard: Shard, manifest: Manifest, identity: dict[str, str], full: bool) -> str | None:
    """How a shard differs from what its manifest says, in a sentence, or None."""
    try:
        status = path.stat()
    except OSError:
        status = None
    if status is None or not S_ISREG(status.st_mode):
        return f"{path} is missing: restore it or build the data set again"
    if difference := status.st_size - shard.bytes:
        return f"{path} is {abs(difference)} bytes {'longer' if difference > 0 else 'shorter'} than its manifest says"
    try:
        schema, batches = map_stream(path)
    except (OSError, pa.ArrowException) as error:
        return f"{path} is not a readable Arrow stream ({error})"
    metadata = schema.metadata or {}
    found = {key: metadata.get(key.encode(), b"?").decode(errors="replace") for key in identity}
    if found != identity:
        place = "shard {shard} of source {source} in split {split}"
        return f"{path} holds {place.format_map(found)}, not {place.format_map(identity)}: files were exchanged"
    if not schema.equals(manifest_schema(manifest)):
        return f"{path} has another schema than the manifest's {manifest.packing.row_tokens} x {manifest.dtype} a row"
    rows = [batch.num_rows for batch in batches]
    if sum(rows) != shard.rows:
        return f"{path} holds {sum(rows)} rows, its manifest says {shard.rows}"
    if set(rows[:-1]) - {rows_per_batch(manifest.packing.row_tokens, manifest.dtype)}:
        return f"{path} has record batches of irregular length"
    if full and file_sha256(path) != shard.sha256:
        return f"{path} has changed: its sha256 is not the manifest's"
    return None
