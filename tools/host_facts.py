"""What one host has, as JSON: `tools.doctor` sends this file to every host's Python, so it needs the standard library only."""

import hashlib
import importlib.metadata
import json
import logging
import platform
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

PACKAGES = ("torch", "deepspeed", "transformers", "numpy", "pyarrow", "pydantic")
CODE = (
    "train.py",
    "engine/**/*.py",
    "console/*.py",
    "launch/*.py",
    "model/**/*.py",
    "storage/*.py",
    "training/*.py",
    "ds_configs/*.json",
    "recipes/*.yaml",
)
MARK = "longform-host-facts "
"""Begins the line with the facts; a login shell may print before it."""

ANSWER_SECONDS = 3.0


def collect(
    code: str, tokens: dict[str, str], data: str | None, first_address: str, port: int, extensions: str = ""
) -> dict:
    """Facts of this host.

    Args:
        code: folder of the repository.
        tokens: folders that all hosts should share, each with the name of a file that must be seen in it.
        data: folder of a data set, if its content matters.
        first_address: address of the first host, to which a connection to `port` is tried.
        extensions: where torch builds C++ code, by TORCH_EXTENSIONS_DIR; empty: its default.
    """
    names, device_memory, torch_problem = devices()
    return {
        "python": platform.python_version(),
        "packages": {name: installed_version(name) for name in PACKAGES},
        "devices": names,
        "device_memory": device_memory,
        "free_memory": free_memory(),
        "torch_problem": torch_problem,
        "code": code_hashes(Path(code)),
        "folders": {folder: (Path(folder) / name).exists() for folder, name in tokens.items() if Path(folder).is_dir()},
        "data": data_hash(Path(data)) if data else None,
        "interfaces": sorted(name for _, name in socket.if_nameindex()),
        "port": _try_port(first_address, port),
        "compiler": shutil.which("c++") or shutil.which("g++"),
        "locks": build_locks(extensions),
        "machine": _machine(),
    }


def code_hashes(root: Path) -> dict[str, str] | None:
    """What decides how this code trains, file by file; None without the folder."""
    if not root.is_dir():
        return None
    files = sorted(file for pattern in CODE for file in root.glob(pattern))
    return {str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def installed_version(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def data_hash(folder: Path) -> str | None:
    """Of the manifest, and of the names and sizes of all files: enough to tell another or an incomplete copy."""
    if not (folder / "manifest.json").is_file():
        return None
    files = sorted((str(file.relative_to(folder)), file.stat().st_size) for file in folder.rglob("*") if file.is_file())
    return hashlib.sha256((folder / "manifest.json").read_bytes() + json.dumps(files).encode()).hexdigest()


def build_locks(extensions: str = "") -> list[tuple[str, float]]:
    """Lock files of builds of C++ code (DeepSpeed's CPUAdam, say), each with its age in seconds.

    A build that was killed leaves its own, for which every later one waits without end.
    """
    logging.disable(logging.WARNING)  # torch warns of a CUDA compiler without a GPU
    try:
        from torch.utils.cpp_extension import get_default_build_root

        root = Path(extensions or get_default_build_root())
    except Exception:  # the reason is among the facts: see `devices`
        return []
    finally:
        logging.disable(logging.NOTSET)
    found = [(file, file.stat()) for pattern in ("*/lock", "*/*/lock") for file in root.glob(pattern)]
    return [(str(file), max(0.0, time.time() - status.st_mtime)) for file, status in sorted(found)]


def devices() -> tuple[list[str], int, str | None]:
    """Names of the GPUs, the bytes of memory of the smallest (0 without GPUs), and why torch does not start."""
    try:
        import torch

        found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return [each.name for each in found], min((each.total_memory for each in found), default=0), None
    except Exception as error:  # whatever a broken installation or driver raises
        return [], 0, f"{type(error).__name__}: {error}".splitlines()[0]


def free_memory() -> int | None:
    """Bytes of host memory that can still be taken, where Linux says it."""
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _try_port(address: str, port: int) -> str:
    """`refused` is the good answer: the host is there, and nobody uses the port yet."""
    try:
        socket.create_connection((address, port), ANSWER_SECONDS).close()
    except ConnectionRefusedError:
        return "refused"
    except OSError as error:
        return f"no answer ({error.strerror or error})"
    return "in use"


def _machine() -> str:
    """Tells one running system from another, whatever they are called: two names of one host give the same."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    addresses = subprocess.run(["hostname", "-I"], capture_output=True, text=True).stdout.split()
    return " ".join([boot.read_text().strip() if boot.exists() else platform.node(), *sorted(addresses)])


if __name__ == "__main__":
    print(MARK + json.dumps(collect(**json.loads(sys.argv[1]), extensions=sys.argv[2])))
