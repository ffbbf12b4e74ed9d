"""The files of a launch over hosts are read as DeepSpeed reads them, and every line it would stumble over is named."""

import base64
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.hostfile import hosts_of_ranks, read_forwarded, read_hostfile, refuse_missing_hostfile


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "file"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_hostfile_is_read_as_deepspeed_reads_it(tmp_path):
    from deepspeed.launcher.runner import fetch_hostfile

    path = written(
        tmp_path, "# two nodes\n\nnode1 slots=8\r\n  user@node-2.cluster\tslots=4 # the old one\n10.0.0.3 slots=1"
    )
    hosts, problems = read_hostfile(path)
    assert problems == []
    assert hosts == fetch_hostfile(str(path)) == {"node1": 8, "user@node-2.cluster": 4, "10.0.0.3": 1}
    assert list(hosts) == ["node1", "user@node-2.cluster", "10.0.0.3"]


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("node1: 8\n", ["line 1: 'node1: 8' is not `name slots=N`"]),
        ("node1 slots=8 max_slots=9\n", ["line 1: 'node1 slots=8 max_slots=9' is not"]),
        ("node1 slots=-1\nnode2\n", ["line 1: ", "line 2: 'node2' is not"]),
        ("node1 slots=2\n#\nnode1 slots=2\n", ["line 3: node1 is already in line 1"]),
        ("node[1-4] slots=8\n", ["line 1: pdsh reads 'node[1-4]' as a pattern"]),
        ("a,b slots=8\n", ["line 1: pdsh reads 'a,b' as a pattern"]),
        ("node1 slots=0\n", ["line 1: node1 has no slots"]),
        ("# nobody\n", ["names no host"]),
        ("", ["names no host"]),
        (b"\xff\xfe slots=1\n", ["it is not UTF-8 text"]),
    ],
)
def test_every_bad_line_of_a_hostfile_is_named(tmp_path, text, sentences):
    path = written(tmp_path, text)
    problems = read_hostfile(path).problems
    assert len(problems) == len(sentences)
    for problem, sentence in zip(problems, sentences, strict=True):
        assert str(path) in problem
        assert sentence in problem


def test_a_hostfile_that_cannot_be_read_is_a_problem(tmp_path):
    assert read_hostfile(tmp_path / "absent").problems == [f"{tmp_path / 'absent'}: this hostfile does not exist"]
    assert read_hostfile(tmp_path).problems == [f"{tmp_path}: this hostfile cannot be read (Is a directory)"]


def test_forwarded_variables_keep_their_values(tmp_path):
    path = written(tmp_path, "A=1\nHF_HOME=/shared/hf = 'x'\n B = 2 \nEMPTY=\n")
    assert read_forwarded(path) == ({"A": "1", "HF_HOME": "/shared/hf = 'x'", "B": "2", "EMPTY": ""}, [])


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("", "an empty line makes `deepspeed` crash"),
        ("# a comment", "a comment makes `deepspeed` crash"),
        ("# A=1", "a comment makes `deepspeed` start nothing"),
        ("A", "'A' makes `deepspeed` crash"),
        ("export A=1", "'export A' is not the name of a variable"),
        ("A=$HOME/x", "the value of A has one of"),
        ('A="1"', "the value of A has one of"),
    ],
)
def test_every_bad_line_of_the_environment_file_is_named(tmp_path, line, sentence):
    path = written(tmp_path, f"GOOD=1\n{line}\n")
    variables, problems = read_forwarded(path)
    assert variables == {"GOOD": "1"}
    assert len(problems) == 1
    assert problems[0].startswith(f"{path}, line 2: {sentence}")


@pytest.mark.parametrize(
    "words",
    [
        ["python", "/venv/bin/deepspeed", "--hostfile", "absent", "train.py"],
        ["python", "/venv/bin/deepspeed", "--master_port", "1", "--hostfile=absent", "train.py", "--data", "x"],
        ["/venv/bin/deepspeed", "-H", "absent", "train.py"],
        ["python", "-m", "deepspeed.launcher.runner", "--hostf", "absent", "train.py"],
    ],
)
def test_a_missing_hostfile_is_seen_in_the_launchers_command(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="--hostfile absent does not exist, so `deepspeed` started this machine alone"):
        refuse_missing_hostfile([["bash"], words, []])
    (tmp_path / "absent").write_text("node1 slots=1\n")
    refuse_missing_hostfile([["bash"], words, []])


@pytest.mark.parametrize(
    "words",
    [
        ["python", "/venv/bin/deepspeed", "--num_gpus", "2", "train.py"],
        ["python", "-m", "tools.doctor", "--hostfile", "absent"],
        ["python", "train.py", "--deepspeed_config", "x", "--hostfile", "absent"],
        [],
    ],
)
def test_other_commands_are_left_alone(words):
    refuse_missing_hostfile([words])


def test_hosts_of_ranks_come_from_the_launcher():
    world = base64.urlsafe_b64encode(json.dumps({"node1": [0, 1], "node2": [3]}).encode()).decode()
    commands = [["bash"], ["python", "-m", "deepspeed.launcher.launch", f"--world_info={world}", "--node_rank=0"]]
    assert hosts_of_ranks(commands) == ["node1", "node1", "node2"]
    assert hosts_of_ranks([["torchrun", "train.py"]]) == []


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
    (tmp_path / "hosts").write_text("a slots=2\r\nb slots=1\r\n", encoding="utf-8-sig")
    assert read_hostfile(tmp_path / "hosts") == ({"a": 2, "b": 1}, [])


@given(st.binary(max_size=40))
def test_any_bytes_are_read_or_refused_in_sentences(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "file")
        path.write_bytes(content)
        for read in (read_hostfile, read_forwarded):
            assert all(str(path) in problem for problem in read(path).problems)
