"""Says what would go wrong with a launch over several hosts, before it does; without a hostfile, describes this machine.

python -m tools.doctor [--hostfile hosts] [--recipe R --deepspeed_config J --data DATA] [--output RUN] [--json]

Run it where you will start `deepspeed`: it logs into every host as the launcher does, compares what it finds there, and
measures how fast the hosts exchange data. Given what `train.py` will be given, it says too what the run needs of them.
"""

import argparse
import contextlib
import json
import shutil
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from console.command import CommandParser, no_url, run_command
from launch.remote import MOST_HOSTS_AT_ONCE, run_on
from tools import host_facts
from tools.ask_hosts import MASTER_PORT, ROOT, clock_difference, facts_of_hosts, keeps_alive
from tools.findings import Findings

NOT_FORWARDED = ("CUDA_", "DEEPSPEED_", "GLOO_", "HF_", "LD_LIBRARY_PATH", "NCCL_", "OMP_", "TORCH_", "WANDB_")
MOST_PAIRS_SHOWN = 10
NOTED_CLOCK_SECONDS, WRONG_CLOCK_SECONDS = 1.0, 60.0
STALE_SECONDS = 600
"""No build of DeepSpeed's takes longer."""


def main() -> None:
    parser = CommandParser(prog="python -m tools.doctor", description=__doc__)
    parser.add_argument("--hostfile", type=Path, help="check a launch on these hosts (default: describe this machine)")
    parser.add_argument("--recipe", help="the run's: say what memory and disk it needs")
    parser.add_argument("--deepspeed_config", help="the run's; needs --recipe and --data")
    parser.add_argument("--data", type=no_url, help="the run's: check that all hosts have the same")
    parser.add_argument(
        "--output", type=no_url, help="the run's: check that all hosts share it, and that checkpoints will fit"
    )
    for axis in ("pipeline", "tensor", "sequence"):
        flag = "--pipeline_stages" if axis == "pipeline" else f"--{axis}"
        parser.add_argument(flag, dest=axis, type=int, metavar="N", help=f"ranks of a {axis} group")
    parser.add_argument("--json", action="store_true", help="print one JSON object: problems, notes, facts")
    arguments = parser.parse_args()
    of_run = [arguments.recipe, arguments.deepspeed_config]
    if any(of_run) and not (all(of_run) and arguments.data):
        raise ValueError(
            "--recipe and --deepspeed_config describe a run only together, and with --data: give all three"
        )
    findings = Findings(silent=arguments.json)
    # Libraries may print to where the JSON is to stand alone.
    with contextlib.redirect_stdout(sys.stderr) if arguments.json else contextlib.nullcontext():
        rooms = check_launch(arguments, findings) if arguments.hostfile else describe_machine(findings)
        if all(of_run) and rooms:
            check_run(arguments, rooms, findings)
    if arguments.json:
        print(json.dumps({"problems": findings.problems, "notes": findings.notes, "facts": findings.facts}, indent=1))
    if count := len(findings.problems):
        raise ValueError(f"{count} problem{'s' * (count > 1)} to solve, see above")
    if not arguments.json:
        print("no problem found" if arguments.hostfile is None else "every host is ready for the launch")


def describe_machine(findings: Findings) -> dict[str, Any]:
    """What this machine is; and, by its name, what it has for a run with a process a GPU."""
    from launch.topology import shell_environment
    from tools.machine_report import machine_report

    findings.facts["machine"] = {}
    for name, value in machine_report(findings.problem, findings.note):
        findings.line(name, value)
        findings.facts["machine"][name] = value
    locks = host_facts.build_locks(shell_environment().get("TORCH_EXTENSIONS_DIR", ""))
    _report_locks(locks, "", findings)
    names, device_memory, _ = host_facts.devices()
    return {"this machine": (max(1, len(names)), host_facts.free_memory(), device_memory)}


def check_run(arguments: argparse.Namespace, rooms: dict[str, Any], findings: Findings) -> None:
    """`rooms`: by host, the fields of a `tools.foreseen_needs.Room`."""
    from launch.topology import choose_accelerator

    choose_accelerator()

    from tools.foreseen_needs import Room, foresee

    needs = foresee(arguments, {host: Room(*room) for host, room in rooms.items()})
    findings.facts["run"] = needs.facts
    for name, text in needs.lines:
        findings.line(name, text)
    for problem in needs.problems:
        findings.problem(problem)


def _report_locks(locks: list, where: str, findings: Findings) -> None:
    for path, age in locks:
        sentence = f"{where}{path} is the lock of a build of C++ code, {age / 60:.0f} minutes old: "
        if age > STALE_SECONDS:
            findings.problem(f"{sentence}the build was killed and every later one waits for it; delete the file")
        else:
            findings.note(f"{sentence}a build is going on, or was killed")


def check_launch(arguments: argparse.Namespace, findings: Findings) -> dict[str, Any]:
    """Examine the hostfile, `.deepspeed_env` and every host. What each has for its ranks; nothing unless all answer."""
    from launch.hostfile import across_hosts, read_hostfile
    from launch.topology import shell_environment

    hosts, problems = read_hostfile(arguments.hostfile)
    for problem in problems:
        findings.problem(problem)
    if sentence := across_hosts(arguments.tensor or 1, list(hosts.values())):
        findings.note(sentence)
    forwarded = check_forwarded(shell_environment(), findings)
    if missing := [name for name in ("ssh", "pdsh")[: 1 + (len(hosts) > 1)] if shutil.which(name) is None]:
        findings.problem(f"not installed here: {', '.join(missing)} (Debian, Ubuntu: apt install openssh-client pdsh)")
    if not hosts or "ssh" in missing:
        return {}
    here, there = facts_of_hosts(list(hosts), arguments, findings)
    findings.facts["hosts"] = {host: facts | {"code": None} for host, facts in there.items()}
    first = next(iter(hosts))
    for host, slots in hosts.items():
        if host in there:
            facts = there[host]
            for problem in host_problems(slots, facts, here, forwarded, first):
                findings.problem(f"{host}: {problem}")
            _report_locks(facts["locks"], f"{host}: ", findings)
            devices = f"{len(facts['devices'])} x {facts['devices'][0]}" if facts["devices"] else "no GPU"
            findings.line(
                host, f"slots={slots}, {devices}, Python {facts['python']}, torch {facts['packages']['torch']}"
            )
    check_between_hosts(there, findings)
    check_clocks(list(there), findings)
    if len(hosts) > 1:
        options = shell_environment().get("PDSH_SSH_ARGS_APPEND", "")
        if deaf := [host for host in there if not keeps_alive(host, options)]:
            findings.note(
                f"`deepspeed` would not notice that {', '.join(deaf)} is lost: set PDSH_SSH_ARGS_APPEND to "
                '"-o ServerAliveInterval=5", or ServerAliveInterval in ~/.ssh/config'
            )
        check_bandwidth(there, here["first_address"], forwarded, findings)
    rooms = {host: (hosts[host], facts["free_memory"], facts["device_memory"]) for host, facts in there.items()}
    return rooms if len(rooms) == len(hosts) else {}


def check_clocks(hosts: list[str], findings: Findings) -> None:
    """How far each host's clock is from this machine's, less the time that asking took: none where it may be right."""
    with ThreadPoolExecutor(MOST_HOSTS_AT_ONCE) as pool:
        differences = dict(zip(hosts, pool.map(clock_difference, hosts), strict=True))
    findings.facts["clock_differences"] = differences
    for host, seconds in differences.items():
        tell = findings.problem if abs(seconds) > WRONG_CLOCK_SECONDS else findings.note
        if abs(seconds) > NOTED_CLOCK_SECONDS:
            way = "ahead of" if seconds > 0 else "behind"
            tell(f"{host}: its clock is {abs(seconds):,.0f} s {way} this machine's; let NTP set both")


def check_bandwidth(there: dict[str, dict], address: str, forwarded: Mapping[str, str], findings: Findings) -> None:
    """Let the hosts exchange data, and say how fast each pair is."""
    from tools import bandwidth

    if findings.problems:
        findings.note("how fast the hosts exchange data is measured once there is no problem")
        return
    if any(facts["port"] == "in use" for facts in there.values()):
        findings.note("how fast the hosts exchange data is not measured beside a run")
        return
    backend = "nccl" if all(facts["devices"] for facts in there.values()) else "gloo"
    try:
        found = bandwidth.measure(list(there), address, MASTER_PORT, backend, forwarded, run_on)
    except ValueError as error:
        for sentence in str(error).splitlines():
            findings.problem(f"the hosts cannot exchange data over {backend}: {sentence}")
        return
    findings.facts["bandwidth"] = found
    slowest = sorted(found["pairs"].items(), key=lambda pair: pair[1])
    findings.line("all-reduce", f"{bandwidth.in_words(found['all_reduce'])} over all hosts ({backend}, of the bus)")
    for pair, rate in slowest[:MOST_PAIRS_SHOWN]:
        findings.line("point to point", f"{bandwidth.in_words(rate)} {pair}")
    if len(slowest) > MOST_PAIRS_SHOWN:
        findings.line("", f"{len(slowest) - MOST_PAIRS_SHOWN} faster pairs, up to {bandwidth.in_words(slowest[-1][1])}")
    for sentence in bandwidth.notes(found):
        findings.note(sentence)


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
    for folder in here["folders"]:
        if folder not in facts["folders"]:
            problems.append(f"no folder {folder}; start the launch in a folder that all hosts share")
        elif not facts["folders"][folder]:
            problems.append(
                f"its {folder} is another folder; data and --output must be on a file system that all hosts share"
            )
    if facts["data"] != here["data"]:
        what = "no data set" if facts["data"] is None else "another or an incomplete data set"
        problems.append(f"{what} in the folder of --data, where this machine has one; let all hosts share it")
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
