"""What the hosts of a launch answer to `tools.doctor` over ssh."""

import argparse
import contextlib
import ipaddress
import json
import shlex
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from launch.remote import MOST_HOSTS_AT_ONCE, run_on
from tools import host_facts
from tools.findings import Findings

ROOT = Path(__file__).resolve().parent.parent
MASTER_PORT = 29500  # the launcher's default


def facts_of_hosts(hosts: list[str], arguments: argparse.Namespace, findings: Findings) -> tuple[dict, dict[str, dict]]:
    """The facts of this machine, and of every host that answers; for the others a problem is reported."""
    from launch.topology import shell_environment

    address = _first_address(hosts[0], findings)
    source = Path(host_facts.__file__).read_text()
    with contextlib.ExitStack() as written:
        tokens = {}
        for folder in {Path.cwd(), *([existing(Path(arguments.output))] if arguments.output else [])}:
            token = written.enter_context(tempfile.NamedTemporaryFile(dir=folder, prefix=".longform-doctor-"))
            tokens[str(folder)] = Path(token.name).name
        question: dict[str, Any] = {
            "code": str(ROOT),
            "tokens": tokens,
            "data": str(Path(arguments.data).absolute()) if arguments.data else None,
            "first_address": address,
            "port": MASTER_PORT,
        }
        words = f"{shlex.quote(sys.executable)} - {shlex.quote(json.dumps(question))}"
        command = f'{words} "${{TORCH_EXTENSIONS_DIR:-}}"'
        with ThreadPoolExecutor(MOST_HOSTS_AT_ONCE) as pool:
            answers = [pool.submit(run_on, host, command, source) for host in hosts]
            here = host_facts.collect(**question, extensions=shell_environment().get("TORCH_EXTENSIONS_DIR", ""))
            there = {}
            for host, answer in zip(hosts, answers, strict=True):
                try:
                    there[host] = _facts(host, answer.result())
                except ValueError as error:
                    findings.problem(str(error))
    return here | {"first_address": address}, there


def existing(folder: Path) -> Path:
    """This folder, or the nearest above it that is there."""
    return next(each for each in (folder.absolute(), *folder.absolute().parents) if each.is_dir())


def _first_address(host: str, findings: Findings) -> str:
    """What DeepSpeed would take for MASTER_ADDR: the first word that `hostname -I` prints there."""
    words = run_on(host, "hostname -I").stdout.split()
    for word in words:
        with contextlib.suppress(ValueError):
            address = str(ipaddress.ip_address(word))
            if word != words[0]:
                findings.problem(
                    f"{host}: its login shell prints {words[0]!r}, which DeepSpeed would take for the address of this host: "
                    "make ~/.bashrc silent, or give the launcher --master_addr"
                )
            return address
    return host


def keeps_alive(host: str, options: str) -> bool:
    """Whether ssh with these options asks a silent host now and then whether it is still there, by its configuration."""
    done = subprocess.run(["ssh", *shlex.split(options), "-G", host], capture_output=True, text=True)
    return "serveraliveinterval 0" not in done.stdout.splitlines()


def _facts(host: str, done: subprocess.CompletedProcess[str]) -> dict:
    """The facts in the answer. Raises ValueError with why there are none."""
    for line in done.stdout.splitlines():
        if line.startswith(host_facts.MARK):
            return json.loads(line.removeprefix(host_facts.MARK))
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    if done.returncode == 255:
        raise ValueError(f"{host}: `ssh {host}` must work without a password or a question, but says: {last}")
    if done.returncode in (126, 127):
        raise ValueError(f"{host}: {sys.executable} must be at the same path on every host, but ssh says: {last}")
    raise ValueError(f"{host}: {sys.executable} fails there: {last}")


def clock_difference(host: str) -> float:
    """Seconds by which the host's clock is ahead of this machine's, at least; 0 where it may be right."""
    asked = time.time()
    words = run_on(host, "date +%s.%N").stdout.split()
    answered = time.time()
    try:
        theirs = float(words[-1])
    except (IndexError, ValueError):
        return 0.0
    return max(theirs - answered, 0.0) + min(theirs - asked, 0.0)
