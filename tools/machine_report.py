"""What one machine offers to a run: the lines that `tools.doctor` prints without a hostfile, to read or to paste."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from launch.topology import wandb_mode
from tools.host_facts import installed_version
from training.environment import environment

ROOT = Path(__file__).resolve().parent.parent
LITTLE_DISK_BYTES = 10e9


def machine_report(problem: Callable[[str], None], note: Callable[[str], None]) -> Iterator[tuple[str, str]]:
    """Yields (name, value) pairs; tells `problem` and `note` what would be in the way, one sentence each."""
    facts = environment()
    git = facts["git"]
    yield "longform", f"{git['commit'][:12]}{' with changes' if git['dirty'] else ''}" if git else "not a git checkout"
    yield "system", f"{facts['platform']}, Python {facts['python']}"
    cores = len(os.sched_getaffinity(0))
    yield "processor", f"{facts['cpu']}, {cores} usable cores, {facts['memory_bytes'] / 2**30:.0f} GiB of memory"
    yield "accelerators", _accelerators(facts["devices"])
    yield "packages", ", ".join(f"{name} {version or 'missing'}" for name, version in facts["packages"].items())
    for name, wanted, found in _differences():
        (note if found else problem)(f"requirements.txt has {name} {wanted}, here is {found or 'none'}")
    compiler = shutil.which("c++") or shutil.which("g++")
    yield "C++ compiler", compiler or "none"
    if compiler is None:
        note("without a C++ compiler the offload JSONs cannot build DeepSpeedCPUAdam (Debian, Ubuntu: apt install g++)")
    yield "launchers", ", ".join(f"{name}: {shutil.which(name) or 'none'}" for name in ("ssh", "pdsh", "srun"))
    yield "W&B", _wandb()
    disk = shutil.disk_usage(".")
    yield "disk", f"{disk.free / 1e9:.0f} GB free of {disk.total / 1e9:.0f} GB in {Path.cwd()}"
    if disk.free < LITTLE_DISK_BYTES:
        note(f"{disk.free / 1e9:.1f} GB of disk are little: under AdamW a checkpoint takes 12 bytes a parameter")


def _accelerators(names: list[str]) -> str:
    if not names:
        return f"none that torch {torch.__version__} can use; training runs on CPUs (gloo)"
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return f"{len(names)} x {names[0]} ({memory:.0f} GiB), CUDA {torch.version.cuda}"


def _wandb() -> str:
    import wandb

    if mode := wandb_mode():
        return f"WANDB_MODE={mode}"
    return (
        "logged in: runs are sent" if wandb.login(prompt=False, verify=False) else "no key: runs are recorded offline"
    )


def _differences() -> Iterator[tuple[str, str, str | None]]:
    """(package, required, installed or None) of requirements.txt, where they are not the same."""
    for name, wanted in re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE):
        found = installed_version(name)
        if found is None or found.partition("+")[0] != wanted:
            yield name, wanted, found
