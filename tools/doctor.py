"""Says what would go wrong with a launch over several hosts, before it does; without a hostfile, describes this machine.

python -m tools.doctor [--hostfile hosts [--tensor N]]

Run it where you will start `deepspeed`: it logs into every host as the launcher does and compares what it finds there.
"""

import contextlib
import ipaddress
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from console.command import CommandParser, run_command
from tools import host_facts

ROOT = Path(__file__).resolve().parent.parent
MASTER_PORT = 29500  # the launcher's default
NOT_FORWARDED = ("CUDA_", "DEEPSPEED_", "GLOO_", "HF_", "LD_LIBRARY_PATH", "NCCL_", "OMP_", "TORCH_", "WANDB_")
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
ANSWER_SECONDS = 120  # torch may be imported from a cold shared file system
MOST_HOSTS_AT_ONCE = 64


class Findings:
    """What was found, printed at once as it comes; problems make the launch fail, notes may surprise."""

    def __init__(self) -> None:
        self.problems = 0

    def problem(self, sentence: str) -> None:
        self.problems += 1
        print(f"problem: {sentence}", flush=True)

    def note(self, sentence: str) -> None:
        print(f"note: {sentence}", flush=True)


def main() -> None:
    parser = CommandParser(prog="python -m tools.doctor", description=__doc__)
    parser.add_argument("--hostfile", type=Path, help="check a launch on these hosts (default: describe this machine)")
    parser.add_argument("--tensor", type=int, default=1, metavar="N", help="ranks of a tensor group, for --hostfile")
    arguments = parser.parse_args()
    findings = Findings()
    if arguments.hostfile is None:
        from tools.machine_report import machine_report

        for name, value in machine_report(findings.problem, findings.note):
            print(f"{name:<15}{value}")
    else:
        check_launch(arguments.hostfile, arguments.tensor, findings)
    if findings.problems:
        raise ValueError(f"{findings.problems} problem{'s' * (findings.problems > 1)} to solve, see above")
    print("no problem found" if arguments.hostfile is None else "every host is ready for the launch")


def check_launch(hostfile: Path, tensor: int, findings: Findings) -> None:
    """Examine the hostfile, `.deepspeed_env` and every host."""
    from launch.hostfile import across_hosts, read_hostfile
    from launch.topology import shell_environment

    hosts, problems = read_hostfile(hostfile)
    for problem in problems:
        findings.problem(problem)
    if sentence := across_hosts(tensor, list(hosts.values())):
        findings.note(sentence)
    forwarded = check_forwarded(shell_environment(), findings)
    if missing := [name for name in ("ssh", "pdsh")[: 1 + (len(hosts) > 1)] if shutil.which(name) is None]:
        findings.problem(f"not installed here: {', '.join(missing)} (Debian, Ubuntu: apt install openssh-client pdsh)")
    if not hosts or "ssh" in missing:
        return
    here, there = facts_of_hosts(list(hosts), findings)
    first = next(iter(hosts))
    for host, slots in hosts.items():
        if host in there:
            facts = there[host]
            for problem in host_problems(slots, facts, here, forwarded, first):
                findings.problem(f"{host}: {problem}")
            devices = f"{len(facts['devices'])} x {facts['devices'][0]}" if facts["devices"] else "no GPU"
            print(f"{host:<15} slots={slots}, {devices}, Python {facts['python']}, torch {facts['packages']['torch']}")
    check_between_hosts(there, findings)


def check_forwarded(shell: Mapping[str, str], findings: Findings) -> dict[str, str]:
    """The variables that will reach the ranks, from the files that DeepSpeed reads: the home folder's, then this one's."""
    from launch.hostfile import read_forwarded

    name = shell.get("DS_ENV_FILE", ".deepspeed_env")
    variables: dict[str, str] = {}
    for folder in (Path(shell.get("HOME", "~")).expanduser(), Path()):
        if (folder / name).is_file():
            found = read_forwarded(folder / name)
            variables |= found.variables
            for problem in found.problems:
                findings.problem(problem)
    lost = sorted(key for key in shell if key.startswith(NOT_FORWARDED) and key not in variables)
    if lost:
        findings.note(f"not forwarded to the ranks unless {name} has them: {', '.join(lost)}")
    return variables


def facts_of_hosts(hosts: list[str], findings: Findings) -> tuple[dict, dict[str, dict]]:
    """The facts of this machine, and of every host that answers; for the others a problem is reported."""
    address = _first_address(hosts[0], findings)
    question: dict[str, Any] = {
        "code": str(ROOT),
        "folder": str(Path.cwd()),
        "first_address": address,
        "port": MASTER_PORT,
    }
    source = Path(host_facts.__file__).read_text()
    with tempfile.NamedTemporaryFile(dir=".", prefix=".longform-doctor-") as token:
        question["token"] = Path(token.name).name
        command = f"{shlex.quote(sys.executable)} - {shlex.quote(json.dumps(question))}"
        with ThreadPoolExecutor(MOST_HOSTS_AT_ONCE) as pool:
            answers = [pool.submit(_run_on, host, command, source) for host in hosts]
            here = host_facts.collect(**question)
            there = {}
            for host, answer in zip(hosts, answers, strict=True):
                try:
                    there[host] = _facts(host, answer.result())
                except ValueError as error:
                    findings.problem(str(error))
    return here | {"first_address": question["first_address"]}, there


def _first_address(host: str, findings: Findings) -> str:
    """What DeepSpeed would take for MASTER_ADDR: the first word that `hostname -I` prints there."""
    words = _run_on(host, "hostname -I").stdout.split()
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


def _run_on(host: str, command: str, source: str = "") -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            [*SSH, host, command],
            input=source,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=ANSWER_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(host, -1, "", f"no answer within {ANSWER_SECONDS} s")


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


def host_problems(slots: int, facts: dict, here: dict, forwarded: Mapping[str, str], first: str) -> list[str]:
    """What is wrong with one host, given this machine's facts and the name of the first host."""
    problems = []
    if facts["python"] != here["python"]:
        problems.append(f"Python {facts['python']} where this machine has {here['python']}")
    for name, version in here["packages"].items():
        if facts["packages"][name] != version:
            problems.append(f"{name} {facts['packages'][name] or 'missing'} where this machine has {version}")
    if facts["torch_problem"]:
        problems.append(f"torch cannot be imported ({facts['torch_problem']})")
    if facts["code"] is None:
        problems.append(f"no folder {ROOT}; the code must be at the same path on every host")
    elif different := sorted(name for name, _ in here["code"].items() ^ facts["code"].items()):
        names = list(dict.fromkeys(different))
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        problems.append(f"other code in {ROOT}: {', '.join(names[:3])}{more}")
    if not facts["folder"]:
        problems.append(f"no folder {Path.cwd()}; start the launch in a folder that all hosts share")
    elif not facts["token"]:
        problems.append(
            f"its {Path.cwd()} is another folder; data and --output must be on a file system that all hosts share"
        )
    if facts["devices"] and slots > len(facts["devices"]):
        problems.append(f"slots={slots} but it has {len(facts['devices'])} GPUs")
    if facts["port"].startswith("no answer"):
        problems.append(
            f"cannot reach {here['first_address']}, the address by which DeepSpeed knows {first} (the first of "
            f"`hostname -I` there): {facts['port']}; give the launcher --master_addr, or open the firewall between the hosts"
        )
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        chosen = forwarded.get(variable, "")
        if chosen and not _has_interface(chosen, facts["interfaces"], by_prefix=variable.startswith("NCCL")):
            problems.append(f"{variable}={chosen} but its network interfaces are {', '.join(facts['interfaces'])}")
    return problems


def _has_interface(names: str, interfaces: list[str], by_prefix: bool) -> bool:
    """Gloo wants whole names; NCCL takes beginnings of names, after `=` whole names, after `^` those not to use."""
    if names.startswith("^"):
        return True
    whole = not by_prefix or names.startswith("=")
    wanted = names.removeprefix("=").split(",")
    return any(name == one if whole else name.startswith(one) for name in interfaces for one in wanted)


def check_between_hosts(there: dict[str, dict], findings: Findings) -> None:
    """What only shows when the hosts are compared with each other."""
    names: dict[str, list[str]] = {}
    for host, facts in there.items():
        names.setdefault(facts["machine"], []).append(host)
    for same in names.values():
        if len(same) > 1:
            findings.problem(f"{' and '.join(same)} are one machine; keep one of the names, with all its slots")
    with_gpu, without = ([host for host, f in there.items() if bool(f["devices"]) == has] for has in (True, False))
    if with_gpu and without:
        findings.problem(f"{', '.join(without)}: no GPU that torch can use, but {', '.join(with_gpu)} has")
    if any(facts["port"] == "in use" for facts in there.values()):
        findings.note(
            f"port {MASTER_PORT} of the first host is in use, perhaps by a run: launch with another --master_port"
        )


if __name__ == "__main__":
    run_command(main)
