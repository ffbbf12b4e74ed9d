"""The doctor against a stand-in for ssh; `tests/cluster` has the real one."""

import itertools
import json
import os
import time
from pathlib import Path

import pytest

from tests.tools.called import call
from tools import bandwidth, doctor, host_facts, machine_report

SSH = """#!/bin/sh
while [ "$1" = -o ]; do shift 2; done
host=$1; shift
case $host in
    localhost) exec sh -c "$*" ;;
    localhost.localdomain) echo "welcome to $host"; exec sh -c "$*" ;;
    other) echo "sh: 1: $1: not found" >&2; exit 127 ;;
    ahead) case "$*" in date*) echo $(($(date +%s) + 100)) ;; *) exec sh -c "$*" ;; esac ;;
    late) case "$*" in date*) echo $(($(date +%s) - 20)) ;; *) exec sh -c "$*" ;; esac ;;
    broken) echo "Traceback"  >&2; echo "SyntaxError: invalid syntax" >&2; exit 1 ;;
    *) echo "Warning: added" >&2; echo "$host: Permission denied (publickey)." >&2; exit 255 ;;
esac
"""


@pytest.fixture
def command(capsys, monkeypatch, tmp_path):
    """Runs the doctor in an empty folder, with our ssh, and pdsh only on request."""
    monkeypatch.chdir(tmp_path)
    for name in ("HOME", "DS_ENV_FILE", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    programs = tmp_path / "bin"
    programs.mkdir()

    def run(hostfile: str | None, *flags: str, pdsh: bool = True):
        for name, text in {"ssh": SSH, **({"pdsh": "#!/bin/sh\n"} if pdsh else {})}.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        if not pdsh:  # whether or not this machine has it
            for tool in ("sh", "hostname"):
                (programs / tool).symlink_to(f"/bin/{tool}")
        monkeypatch.setenv("PATH", str(programs) + ("" if not pdsh else os.pathsep + os.environ["PATH"]))
        if hostfile is None:
            return call(doctor.main, capsys, monkeypatch, *flags)
        Path("hosts").write_text(hostfile)
        return call(doctor.main, capsys, monkeypatch, "--hostfile", "hosts", *flags)

    return run


def test_a_good_host(command, tmp_path):
    done = command("localhost slots=2\n", pdsh=False)
    assert (done.code, done.err) == (0, ""), done.out
    assert done.out.splitlines()[-1] == "every host is ready for the launch"
    assert not list(tmp_path.glob(".longform-doctor-*"))


@pytest.mark.parametrize(("tensor", "said"), [("2", False), ("4", True)])
def test_a_tensor_group_across_hosts_is_noted(command, tensor, said):
    done = command("localhost slots=2\nother slots=2\n", "--tensor", tensor)
    sentence = f"note: tensor-parallel groups of {tensor} ranks lie across hosts, which have 2: every block waits"
    assert (sentence in done.out) == said


def test_a_greeting_would_become_the_address(command):
    done = command("localhost.localdomain slots=2\n", pdsh=False)
    assert done.code == 2
    assert "its login shell prints 'welcome', which DeepSpeed would take for the address of this host" in done.out
    assert done.out.count("problem: ") == 1
    assert "localhost.localdomain slots=2, " in done.out


def test_hosts_that_do_not_answer_as_they_should(command):
    done = command("closed slots=1\nother slots=1\nbroken slots=1\n", pdsh=False)
    assert done.code == 2
    for part in (
        "not installed here: pdsh",
        "closed: `ssh closed` must work without a password or a question, but says: closed: Permission denied (publickey).",
        "must be at the same path on every host, but ssh says: sh: 1:",
        "fails there: SyntaxError: invalid syntax",
    ):
        assert part in done.out
    assert done.out.count("problem: ") == 4
    assert done.err == "error: 4 problems to solve, see above\n"


def test_bad_files_are_reported_beside_each_other(command, tmp_path, monkeypatch):
    (tmp_path / "forwarded").write_text("WANDB_API_KEY=x\n\n")
    monkeypatch.setenv("DS_ENV_FILE", "forwarded")
    monkeypatch.setenv("WANDB_API_KEY", "x")
    monkeypatch.setenv("HF_HOME", "/secret")
    done = command("localhost: 8\n")
    assert done.code == 2
    assert "problem: hosts, line 1: 'localhost: 8' is not `name slots=N`" in done.out
    assert "problem: forwarded, line 2: an empty line makes `deepspeed` crash" in done.out
    (note,) = [line for line in done.out.splitlines() if line.startswith("note: not forwarded")]
    assert "HF_HOME" in note
    assert "WANDB_API_KEY" not in note
    assert "/secret" not in done.out


def facts(**changes) -> dict:
    return {
        "python": "3.11.7",
        "packages": {"torch": "2.13.0", "deepspeed": "0.19.8"},
        "devices": [],
        "torch_problem": None,
        "code": {"train.py": "1", "engine/step.py": "2"},
        "folders": {"/run": True},
        "data": "1",
        "locks": [],
        "device_memory": 0,
        "free_memory": None,
        "interfaces": ["lo", "eth0", "ib0"],
        "port": "refused",
        "machine": "a",
    } | changes


@pytest.mark.parametrize(
    ("changes", "forwarded", "sentence"),
    [
        ({"python": "3.12.1"}, {}, "Python 3.12.1 where this machine has 3.11.7"),
        ({"packages": {"torch": None, "deepspeed": "0.19.8"}}, {}, "torch missing where this machine has 2.13.0"),
        ({"torch_problem": "ImportError: libcudart"}, {}, "torch cannot be imported (ImportError: libcudart)"),
        ({"code": None}, {}, "the code must be at the same path on every host"),
        ({"code": {"train.py": "1"}}, {}, "engine/step.py"),
        ({"code": {"train.py": "9", "engine/step.py": "2"}}, {}, "train.py"),
        ({"folders": {}}, {}, "start the launch in a folder that all hosts share"),
        (
            {"folders": {"/run": False}},
            {},
            "its /run is another folder; data and --output must be on a file system that all hosts share",
        ),
        ({"data": None}, {}, "no data set in the folder of --data"),
        ({"data": "2"}, {}, "another or an incomplete data set in the folder of --data"),
        ({"devices": ["H100"]}, {}, "slots=2 but it has 1 GPUs"),
        ({"port": "no answer (timed out)"}, {}, "cannot reach 10.0.0.1, the address by which DeepSpeed knows node1"),
        ({}, {"GLOO_SOCKET_IFNAME": "eth"}, "GLOO_SOCKET_IFNAME=eth but its network interfaces are lo, eth0, ib0"),
        ({}, {"NCCL_SOCKET_IFNAME": "=eth"}, "NCCL_SOCKET_IFNAME==eth but its network interfaces"),
        ({}, {"NCCL_SOCKET_IFNAME": "en,wl"}, "NCCL_SOCKET_IFNAME=en,wl but its network interfaces"),
    ],
)
def test_what_is_wrong_with_a_host(changes, forwarded, sentence):
    here = facts(first_address="10.0.0.1")
    (problem,) = doctor.host_problems(2, facts(**changes), here, forwarded, "node1")
    assert sentence in problem


@pytest.mark.parametrize(
    "forwarded",
    [
        {"GLOO_SOCKET_IFNAME": "eth0"},
        {"GLOO_SOCKET_IFNAME": "eth1,ib0"},
        {"NCCL_SOCKET_IFNAME": "eth"},
        {"NCCL_SOCKET_IFNAME": "=ib0"},
        {"NCCL_SOCKET_IFNAME": "^docker0"},
    ],
)
def test_nothing_is_wrong_with_an_equal_host(forwarded):
    here = facts(first_address="10.0.0.1")
    assert doctor.host_problems(2, facts(devices=["H100"] * 2, port="in use"), here, forwarded, "node1") == []


def test_comparing_hosts(capsys):
    findings = doctor.Findings()
    there = {"a": facts(devices=["H100"]), "b": facts(), "c": facts(machine="c", port="in use", devices=["H100"])}
    doctor.check_between_hosts(there, findings)
    said = capsys.readouterr().out
    assert len(findings.problems) == 2
    assert "a and b are one machine" in said
    assert "b: no GPU that torch can use, but a, c has" in said
    assert "note: port 29500 of the first host is in use" in said


def test_facts_are_collected_with_the_standard_library_only(tmp_path):
    (tmp_path / "engine/layout").mkdir(parents=True)
    (tmp_path / "engine/layout/mesh.py").write_text("z")
    (tmp_path / "train.py").write_text("x")
    (tmp_path / "engine/step.py").write_text("y")
    (tmp_path / "token").touch()
    found = host_facts.collect(str(tmp_path), {str(tmp_path): "token", "/absent": "token"}, None, "127.0.0.1", 1)
    assert sorted(found["code"]) == ["engine/layout/mesh.py", "engine/step.py", "train.py"]
    assert (found["folders"], found["port"]) == ({str(tmp_path): True}, "refused")
    assert host_facts.code_hashes(tmp_path / "absent") is None
    lines = Path(host_facts.__file__).read_text().splitlines()
    ours = ("from console", "from data_prep", "from engine", "from launch", "from model", "from tools", "from training")
    assert not [line for line in lines if line.startswith(ours)]


def test_the_machine_is_described(command, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    done = command(None)
    assert (done.code, done.err) == (0, "")
    for part in (
        "longform ",
        "usable cores",
        "torch ",
        "deepspeed ",
        "WANDB_MODE=offline",
        "GB free",
        "no problem found",
    ):
        assert part in done.out


def test_other_versions_than_required_are_said(command, monkeypatch, tmp_path):
    (tmp_path / "requirements.txt").write_text("# pinned\ntorch==0.1.0  # tensors\nno-such-package==3.0\nnumpy>=1\n")
    monkeypatch.setattr(machine_report, "ROOT", tmp_path)
    done = command(None)
    assert done.code == 2
    assert "note: requirements.txt has torch 0.1.0, here is 2." in done.out
    assert "problem: requirements.txt has no-such-package 3.0, here is none" in done.out
    assert done.out.count("requirements.txt has") == 2


def test_clocks_that_differ(command):
    done = command("ahead slots=1\nlate slots=1\n")
    assert done.code == 2
    (problem,) = [line for line in done.out.splitlines() if "problem: ahead: its clock is " in line]
    assert "s ahead of this machine's; let NTP set both" in problem
    assert "note: late: its clock is " in done.out
    assert "s behind this machine's" in done.out


def test_locks_of_killed_builds(command, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "builds"))
    for name, age in (("old", 3600), ("new", 10)):
        lock = tmp_path / "builds" / name / "lock"
        lock.parent.mkdir(parents=True)
        lock.touch()
        os.utime(lock, (time.time() - age,) * 2)
    for done, where in ((command(None), ""), (command("localhost slots=1\n", pdsh=False), "localhost: ")):
        assert done.code == 2
        assert (
            f"problem: {where}{tmp_path}/builds/old/lock is the lock of a build of C++ code, 60 minutes old" in done.out
        )
        assert f"note: {where}{tmp_path}/builds/new/lock is the lock" in done.out


def test_findings_as_json(command):
    done = command("localhost slots=1\nclosed slots=1\n", "--json")
    assert done.code == 2
    said = json.loads(done.out)
    assert [problem.split(":")[0] for problem in said["problems"]] == ["closed"]
    assert said["facts"]["hosts"]["localhost"]["port"] == "refused"
    assert set(said) == {"problems", "notes", "facts"}


def test_half_of_a_run_is_refused(command):
    done = command(None, "--recipe", "r.yaml")
    assert (done.code, done.out) == (2, "")
    assert "describe a run only together, and with --data: give all three" in done.err


def test_data_sets_are_told_apart(tmp_path):
    for name in ("one", "same", "short"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
        (tmp_path / name / "shard").write_text("x" if name == "short" else "xy")
    one, same, short = (host_facts.data_hash(tmp_path / name) for name in ("one", "same", "short"))
    assert one == same != short
    assert host_facts.data_hash(tmp_path) is None


@pytest.mark.parametrize("count", [2, 3, 4, 7, 8])
def test_every_pair_meets_once_and_nobody_twice_in_a_round(count):
    rounds = list(bandwidth.rounds(count))
    assert sorted(pair for pairs in rounds for pair in pairs) == list(itertools.combinations(range(count), 2))
    for pairs in rounds:
        assert len({host for pair in pairs for host in pair}) == 2 * len(pairs)


@pytest.mark.parametrize(
    ("pairs", "beginnings"),
    [
        ({"a - b": 900e6, "a - c": 800e6, "b - c": 700e6}, []),
        ({"a - b": 5e6, "a - c": 900e6, "b - c": 4e6}, ["b: exchanges 5.0 MB/s at most", "the network gives"]),
        ({"a - b": 300e6, "a - c": 900e6, "b - c": 900e6}, ["a - b: 300 MB/s between them"]),
        ({"a - b": 20e6}, ["the network gives 20.0 MB/s at best"]),
    ],
)
def test_what_is_noted_of_rates(pairs, beginnings):
    said = bandwidth.notes({"pairs": pairs})
    assert len(said) == len(beginnings)
    for sentence, beginning in zip(said, beginnings, strict=True):
        assert sentence.startswith(beginning)
