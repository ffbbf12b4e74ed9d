"""What one host has, as JSON: `tools.doctor` sends this file to every host's Python, so it needs the standard library only."""

import hashlib
import importlib.metadata
import json
import platform
import shutil
import socket
import subprocess
import sys
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


def collect(code: str, folder: str, token: str, first_address: str, port: int) -> dict:
    """Facts of this host.

    Args:
        code: folder of the repository.
        folder: folder of the launch, and `token`, the name of a file that must be seen in it.
        first_address: address of the first host, to which a connection to `port` is tried.
    """
    devices, torch_problem = _devices()
    return {
        "python": platform.python_version(),
        "packages": {name: installed_version(name) for name in PACKAGES},
        "devices": devices,
        "torch_problem": torch_problem,
        "code": code_hashes(Path(code)),
        "folder": Path(folder).is_dir(),
        "token": (Path(folder) / token).exists(),
        "interfaces": sorted(name for _, name in socket.if_nameindex()),
        "port": _try_port(first_address, port),
        "compiler": shutil.which("c++") or shutil.which("g++"),
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


def _devices() -> tuple[list[str], str | None]:
    """Names of the GPUs, and why torch does not start."""
    try:
        import torch

        return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())], None
    except Exception as error:  # whatever a broken installation or driver raises
        return [], f"{type(error).__name__}: {error}".splitlines()[0]


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
    print(MARK + json.dumps(collect(**json.loads(sys.argv[1]))))
