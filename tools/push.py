"""A data set, an export of one or a checkpoint, to object storage: `python -m tools.push SOURCE s3://bucket/place`.

SOURCE is verified, every byte, before it is sent; its manifest is sent last, so nothing half sent counts as whole, for
training or for `tools.pull`. After a kill or a lost connection the same command continues with the files that are not there.
Any protocol of `fsspec` goes, with its package of requirements-storage.txt.
"""

if __name__ == "__main__":
    from console.command import end_at_ctrl_c

    end_at_ctrl_c()

import json
from pathlib import Path

from console.command import CommandParser, run_command
from console.progress import Progress
from data_prep.export_files import EXPORT_FILE, export_problems, read_export
from data_prep.verify import problems
from storage.manifest import MANIFEST_FILE
from storage.on_demand import ON_DEMAND_FILE
from storage.remote import Remote
from storage.transfer import Listing, listing_of, push


def verified(folder: Path) -> Listing:
    """What a folder holds, every byte of it checked. Raises ValueError."""
    if (folder / EXPORT_FILE).is_file():
        _no_problem([problem for _, problem in export_problems(folder, full=True) if problem])
        names = {facts["file"] for facts in read_export(folder)["files"]}
        return listing_of(folder, "export", EXPORT_FILE, names | {EXPORT_FILE})
    if (folder / "checkpoints").is_dir():
        newest = max((folder / "checkpoints").glob("step-*"), default=folder / "checkpoints" / "step-…")
        raise ValueError(f"{folder} is a run: give one of its checkpoints, such as {newest}")
    try:
        content = json.loads((folder / MANIFEST_FILE).read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} is no data set, export or checkpoint: {MANIFEST_FILE} cannot be read ({error})"
        ) from None
    if (folder / ON_DEMAND_FILE).is_file():
        raise ValueError(f"{folder} has its shards elsewhere ({ON_DEMAND_FILE} says where): pull it whole first")
    if "splits" in content:
        _no_problem([problem for _, problem in problems(folder, full=True) if problem])
        found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        kept = {path.as_posix() for path in found if not path.name.startswith(".") and path.suffix != ".tmp"}
        return listing_of(folder, "data set", MANIFEST_FILE, kept)
    from engine.checkpoint.manifest import read_manifest

    return listing_of(folder, "checkpoint", MANIFEST_FILE, {*read_manifest(folder).files, MANIFEST_FILE})


def _no_problem(found: list[str]) -> None:
    if found:
        raise ValueError(found[0])


def main() -> None:
    parser = CommandParser(prog="python -m tools.push", description=__doc__)
    parser.add_argument(
        "source", type=Path, metavar="SOURCE", help="data set, export, or checkpoint (RUN/checkpoints/step-...)"
    )
    parser.add_argument("place", metavar="URL", help="where to, such as s3://bucket/my-data")
    parser.add_argument("--read-back", action="store_true", help="also read all that is there and compare its hashes")
    arguments = parser.parse_args()
    place = Remote(arguments.place)
    listing = verified(arguments.source)
    with Progress("sending", listing.size) as progress:
        new = push(arguments.source, listing, place, progress.advance, arguments.read_back)
    how = "sent" if new else "was there already"
    print(
        f"{listing.kind} {arguments.source}: {len(listing.files):,} files, {listing.size / 1e6:,.1f} MB {how}, at {place.url}"
    )


if __name__ == "__main__":
    run_command(main)
