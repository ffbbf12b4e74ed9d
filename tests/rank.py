"""One rank of `tests.ranks.Ranks`: `python -m tests.rank FOLDER`, told on its standard input which calls to make."""

import gc
import importlib
import os
import pickle
import sys
import time
import traceback
from pathlib import Path


def serve(folder: Path) -> int:
    """What each rank does: makes the calls whose numbers it is told, to the end of its input or the first failure."""
    with os.fdopen(os.dup(0)) as numbers, Path(os.devnull).open() as nothing:
        os.dup2(nothing.fileno(), 0)  # what the functions start must not read the numbers
        for number in numbers:
            if not _answer(folder, number.strip()):
                return 1
            gc.collect()  # the process groups of the last call, and their threads
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.barrier()  # gloo aborts when one rank tears down while another still talks to it
        distributed.destroy_process_group()
    return 0


def _answer(folder: Path, number: str) -> bool:
    """Makes one call; the report is renamed into place, so a rank killed while writing has none."""
    try:
        name, args, process_group = pickle.loads((folder / f"call-{number}").read_bytes())
        module, function = name.split(":")
        if process_group:
            import torch.distributed

            if not torch.distributed.is_initialized():
                torch.distributed.init_process_group("gloo")
        value = getattr(importlib.import_module(module), function)(*args)
        good, report = True, pickle.dumps((time.time(), True, value))
    except BaseException:
        good, report = False, pickle.dumps((time.time(), False, traceback.format_exc()))
    temporary = folder / f"writing-{number}-{os.environ['RANK']}"
    temporary.write_bytes(report)
    temporary.rename(folder / f"report-{number}-{os.environ['RANK']}")
    return good


if __name__ == "__main__":
    code = serve(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
