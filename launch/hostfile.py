"""The two files of a launch over several hosts, as DeepSpeed reads them, and the launcher's command line.

DeepSpeed trains on this machine alone when the hostfile does not exist, ends in a traceback for a bad line of either file,
and takes some lines for something else than they say. Here every such line is found and told in one sentence.
"""

import argparse
import base64
import json
import re
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import psutil

HOST_LINE = re.compile(r"(\S+)\s+slots=(\d+)\s*(#.*)?")
READ_BY_PDSH = re.compile(r"[\[\],^/]|^-")
"""What makes pdsh read a name as a list of names, a file or a pattern."""

VARIABLE = re.compile(r"[A-Za-z_]\w*")
READ_BY_SHELL = re.compile(r"[\"`$\\]")
"""What a shell does not leave alone between double quotes, which DeepSpeed puts around a value with special characters."""


class Hosts(NamedTuple):
    slots: dict[str, int]
    problems: list[str]


def read_hostfile(path: Path) -> Hosts:
    """The hosts in order with their slots (processes), and one sentence a problem."""
    hosts: dict[str, int] = {}
    first_line: dict[str, int] = {}
    problems: list[str] = []
    for number, line in _lines(path, "hostfile", problems):
        where, match = f"{path}, line {number}", HOST_LINE.fullmatch(line)
        if not line or line.startswith("#"):
            continue
        if not match:
            problems.append(f"{where}: {line!r} is not `name slots=N`")
            continue
        name, slots = match[1], int(match[2])
        if name in first_line:
            problems.append(f"{where}: {name} is already in line {first_line[name]}; give every host one line")
        elif READ_BY_PDSH.search(name):
            problems.append(
                f"{where}: pdsh reads {name!r} as a pattern; write every host's own name in a line of its own"
            )
        elif slots == 0:
            problems.append(f"{where}: {name} has no slots; remove the line, or give it one slot a process")
        else:
            hosts[name] = slots
        first_line.setdefault(name, number)
    if not first_line and not problems:
        problems.append(f"{path} names no host: write one `name slots=N` line a host")
    return Hosts(hosts, problems)


class Forwarded(NamedTuple):
    variables: dict[str, str]
    problems: list[str]


def read_forwarded(path: Path) -> Forwarded:
    """The variables of a `.deepspeed_env`, which DeepSpeed sets on every host, and one sentence a problem."""
    variables: dict[str, str] = {}
    problems: list[str] = []
    for number, line in _lines(path, ".deepspeed_env", problems):
        where = f"{path}, line {number}"
        name, equals, value = (part.strip() for part in line.partition("="))
        if not equals or line.startswith("#"):
            kind = "a comment" if line.startswith("#") else repr(line) if line else "an empty line"
            consequence = "start nothing" if equals else "crash"
            problems.append(f"{where}: {kind} makes `deepspeed` {consequence}; only NAME=value lines may be there")
        elif not VARIABLE.fullmatch(name):
            problems.append(f"{where}: {name!r} is not the name of a variable; only NAME=value lines may be there")
        elif READ_BY_SHELL.search(value):
            problems.append(
                f'{where}: the value of {name} has one of " ` $ \\, which the shells of the hosts would interpret; '
                "write it without"
            )
        else:
            variables[name] = value
    return Forwarded(variables, problems)


def _lines(path: Path, what: str, problems: list[str]) -> list[tuple[int, str]]:
    try:
        return [
            (number, line.strip()) for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1)
        ]
    except FileNotFoundError:
        problems.append(f"{path}: this {what} does not exist")
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{path}: this {what} cannot be read ({getattr(error, 'strerror', 'it is not UTF-8 text')})")
    return []


def launcher_commands() -> list[list[str]]:
    """The command lines of the processes that started this one, the nearest first."""
    commands = []
    for process in psutil.Process().parents():
        try:
            commands.append(process.cmdline())
        except psutil.Error:
            continue
    return commands


def refuse_missing_hostfile(commands: Sequence[Sequence[str]]) -> None:
    """Raise ValueError when `deepspeed` was given a hostfile that is not there, and so started this machine alone."""
    for words in commands:
        launchers = [i for i, word in enumerate(words[:3]) if _is_deepspeed(word)]
        if launchers:
            parser = argparse.ArgumentParser(add_help=False)
            parser.add_argument("-H", "--hostfile")
            given = parser.parse_known_args(words[launchers[0] + 1 :])[0].hostfile
            if given and not Path(given).is_file():
                raise ValueError(
                    f"--hostfile {given} does not exist, so `deepspeed` started this machine alone: give a file with one "
                    "`name slots=N` line a host, or leave --hostfile out"
                )


def _is_deepspeed(word: str) -> bool:
    return Path(word).name in ("deepspeed", "deepspeed.pt", "ds") or word == "deepspeed.launcher.runner"


def hosts_of_ranks(commands: Sequence[Sequence[str]]) -> list[str]:
    """The host of every rank by DeepSpeed's launcher; empty when something else started this process."""
    for words in commands:
        for word in words:
            if word.startswith("--world_info="):
                slots = json.loads(base64.urlsafe_b64decode(word.partition("=")[2]))
                return [host for host, ids in slots.items() for _ in ids]
    return []


def across_hosts(tensor: int, slots: Sequence[int]) -> str:
    """A sentence where tensor-parallel groups, of so many consecutive ranks, do not lie on one host each; else nothing.

    `slots`: ranks of each host, in their order.
    """
    if all(end % tensor == 0 for end in accumulate(slots)):
        return ""
    ranks = " or ".join(str(count) for count in sorted(set(slots)))
    return (
        f"tensor-parallel groups of {tensor} ranks lie across hosts, which have {ranks}: every block waits for the network "
        "between them; take a degree that divides the ranks of a host"
    )
