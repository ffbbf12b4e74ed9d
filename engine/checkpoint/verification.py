"""Checkpoints proven by all ranks together: the first decides which are looked at, and each file is hashed once, by one.

What a rank hashes is its share by bytes, so a checkpoint costs the time that the busiest share does.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from engine.checkpoint.division import dealt
from engine.checkpoint.manifest import Files, FindChange, change_of

Result = TypeVar("Result")


def on_first_rank(work: Callable[[FindChange], Result]) -> Result:
    """What `work` returns on the first rank, told to all; its ValueError is raised on all of them.

    The `FindChange` that it is given is carried out by all ranks, once for each folder. Collective over all ranks.
    """
    outcome: Any
    if dist.get_rank() > 0:
        while True:
            task, outcome = _tell(None)
            if task is None:
                return _returned(outcome)
            _find_together(*task)
    proven: dict[Path, str | None] = {}

    def find_change(folder: Path, files: Files) -> str | None:
        if folder not in proven:
            _tell(((folder, files), None))
            proven[folder] = _find_together(folder, files)
        return proven[folder]

    try:
        outcome = work(find_change)
    except ValueError as error:
        outcome = error
    return _returned(_tell((None, outcome))[1])


def _tell(message: Any) -> Any:
    """The first rank's message."""
    box = [message]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _returned(outcome: Any) -> Any:
    if isinstance(outcome, ValueError):
        raise outcome
    return outcome


def _find_together(folder: Path, files: Files) -> str | None:
    """As `manifest.find_change`, of this rank's files; the finding for the first file that has one is everybody's."""
    mine = of_this_rank({name: size for name, (size, _) in files.items()})
    changes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(changes, {name: change_of(folder / name, files[name][1]) for name in mine})
    found = {name: change for some in changes for name, change in some.items()}
    return next((found[name] for name in files if found[name]), None)


def of_this_rank(sizes: dict[str, int]) -> list[str]:
    """The names that fall to it where all ranks share the work."""
    return [name for name, rank in dealt(sizes, dist.get_world_size()).items() if rank == dist.get_rank()]
