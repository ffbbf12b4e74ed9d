"""Where and with what a run took place: recorded once, so that a result can be explained later."""

import contextlib
import importlib.metadata
import platform
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "deepspeed",
    "transformers",
    "datasets",
    "sentencepiece",
    "tokenizers",
    "pyarrow",
    "numpy",
    "wandb",
)

CGROUP_FILES = {
    # version: limit, memory in use, and the line of memory.stat with the file cache, all in bytes
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"),
    2: ("memory.max", "memory.current", "file"),
}


def environment() -> dict[str, Any]:
    """JSON-able facts: git commit, versions, command line, host, processor, memory, accelerators, time in UTC."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "git": _git(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES} | {"torch": torch.__version__},
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_cores": psutil.cpu_count(logical=False),
        "memory_bytes": psutil.virtual_memory().total,
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
    }


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process has held: allocated on the GPU, or resident in RAM where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    kilobytes = next((line.split()[1] for line in lines if line.startswith("VmHWM:")), None)
    # Elsewhere: a figure that begins with the peak of the process that started this one.
    return int(kilobytes or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024


def free_memory_bytes(device: torch.device) -> int:
    """Memory that can still be taken: of the GPU, or of this host within the limits of this process's control groups."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([psutil.virtual_memory().available, *free_of_cgroups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])


def free_of_cgroups(membership: Path, root: Path) -> Iterator[int]:
    """For each control group with a memory limit that holds this process: the limit less what is used and is no file cache.

    `membership` has lines `number:controllers:path` (cgroups(7)); version 2 has no controllers there, version 1 the
    controller's name, which is also its folder below `root`. A container sees its own group as the root.
    """
    for line in membership.read_text().splitlines() if membership.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "memory" if controllers else root
        limit, used, cached = CGROUP_FILES[1 if controllers else 2]
        group = base / path.strip("/")
        for folder in [folder for folder in (group, *group.parents) if folder.is_relative_to(base)]:
            with contextlib.suppress(OSError, ValueError, KeyError):  # "max", or no such file
                statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                in_use = int((folder / used).read_text()) - int(statistics[cached])
                yield max(0, int((folder / limit).read_text()) - in_use)


def _git() -> dict[str, Any] | None:
    """Commit, branch and whether tracked files differ from it; None outside a repository or without git."""
    commit = _git_output("rev-parse", "HEAD")
    if not commit:
        return None
    dirty = _git_output("status", "--porcelain", "--untracked-files=no") != ""
    return {"commit": commit, "branch": _git_output("rev-parse", "--abbrev-ref", "HEAD"), "dirty": dirty}


def _git_output(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
