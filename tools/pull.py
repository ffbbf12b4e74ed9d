"""What `tools.push` sent to object storage, back: `python -m tools.pull s3://bucket/place TARGET`.

Every file is compared with the hash that it was sent with, and TARGET appears when all of it is here. After a kill or a lost
connection the same command continues, in the middle of a file. A checkpoint keeps its name: RUN/checkpoints/step-00001000.

With --on-demand GB a data set can be trained on at once: its shards come when a row of them is first read, at most so many
gigabytes lie in TARGET, and any number of processes may read them. Rows are drawn from all over a data set, so that a limit
far below its size means to fetch shards again and again.
"""

if __name__ == "__main__":
    from console.command import end_at_ctrl_c

    end_at_ctrl_c()

from pathlib import Path

from console.command import CommandParser, run_command
from console.progress import Progress
from storage.on_demand import pull_on_demand
from storage.remote import Remote
from storage.transfer import pull, read_listing


def main() -> None:
    parser = CommandParser(prog="python -m tools.pull", description=__doc__)
    parser.add_argument("place", metavar="URL", help="where it is, such as s3://bucket/my-data")
    parser.add_argument("target", type=Path, metavar="TARGET", help="folder to make")
    on_demand = "bring shards when they are read, at most so many gigabytes at a time (default: all of them now)"
    parser.add_argument("--on-demand", type=float, metavar="GB", help=on_demand)
    arguments = parser.parse_args()
    place, target = Remote(arguments.place), arguments.target
    listing = read_listing(place)
    if listing.kind == "checkpoint" and target.name != listing.name:
        raise ValueError(f"{target}: this checkpoint is found under its own name only: give {target / listing.name}")
    if arguments.on_demand is not None:
        pull_on_demand(place, listing, target, int(arguments.on_demand * 1e9))
        print(
            f"{listing.kind} {target}: shards come from {place.url} when they are read, at most {arguments.on_demand:g} GB"
        )
        return
    with Progress("fetching", listing.size) as progress:
        pull(place, listing, target, progress.advance)
    print(
        f"{listing.kind} {target}: {len(listing.files):,} files, {listing.size / 1e6:,.1f} MB, every hash as it was sent"
    )


if __name__ == "__main__":
    run_command(main)
