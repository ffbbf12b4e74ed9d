"""metrics.jsonl survives kills at any byte and continues from any step."""

import errno
import io
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.processes import run_cli, start_cli
from training.records import RecordFile, drop_records_after, finite, read_records

RECORDS = st.lists(st.fixed_dictionaries({"step": st.integers(0, 20), "text": st.text(max_size=8)}), max_size=12)


def write_all(path: Path, records: list[dict], resumed_step: int = 0) -> None:
    file = RecordFile(path, resumed_step)
    for record in records:
        file.write(record)
    file.close(0)


@given(RECORDS, st.data())
def test_a_file_cut_anywhere_continues_with_its_whole_records(records, data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        write_all(path, records)
        content = path.read_bytes()
        cut = data.draw(st.integers(0, len(content)))
        path.write_bytes(content[:cut])
        whole = records[: content[:cut].count(b"\n")]
        assert read_records(path) == whole

        resumed_step = data.draw(st.integers(0, 20))
        write_all(path, [{"step": resumed_step + 1}], resumed_step)
        kept = [record for record in whole if record["step"] <= resumed_step] if resumed_step else []
        assert read_records(path) == [*kept, {"step": resumed_step + 1}]
        assert list(Path(folder).iterdir()) == [path]


def test_nothing_is_rewritten_when_nothing_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_all(path, [{"step": 1}, {"step": 2}])
    before = path.stat().st_ino
    drop_records_after(path, 2)
    assert path.stat().st_ino == before
    drop_records_after(path, 1)
    assert path.stat().st_ino != before
    drop_records_after(tmp_path / "absent", 1)


def test_a_killed_writer_leaves_every_record_it_had_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    script = f"""
from pathlib import Path
from training.records import RecordFile
file, step = RecordFile(Path({str(path)!r}), 0), 0
while True:
    step += 1
    file.write({{"step": step, "filler": "x" * 20_000}})
"""
    with start_cli(["python", "-c", script]) as running:
        running.wait_for(lambda: path.exists() and path.stat().st_size > 1_000_000)
        running.send_signal(signal.SIGKILL)
        running.finish()
    records = read_records(path)
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    assert len(records) >= 49


@pytest.mark.parametrize("damage", ["{", "[1]", '{"loss": 1}', '{"step": null}', "\x00"])
def test_damage_in_the_middle_is_named(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{damage}\n{{"step": 2}}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a record"):
        read_records(path)


def test_numbers_that_json_lacks_become_null(tmp_path):
    record = {"step": 1, "loss": float("nan"), "sets": {"a": [float("inf"), 1.5]}}
    write_all(tmp_path / "metrics.jsonl", [record])
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "loss": None, "sets": {"a": [None, 1.5]}}
    assert finite(record) == json.loads(line)


def test_a_file_that_cannot_grow_keeps_whole_records_and_is_named(tmp_path):
    script = (
        "import sys; from pathlib import Path; from training.records import RecordFile\n"
        "file = RecordFile(Path(sys.argv[1]), 0)\n"
        "for step in range(1, 1000): file.write({'step': step, 'loss': 1.0})"
    )
    path = tmp_path / "metrics.jsonl"
    limited = ["bash", "-c", 'ulimit -f 1; exec "$@"', "bash", sys.executable, "-c", script, path]
    done = run_cli(limited)
    assert "metrics.jsonl cannot be written (" in done.stderr
    lines = path.read_bytes().splitlines(keepends=True)
    assert [json.loads(line)["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert lines[-1].endswith(b"\n")


def test_lines_wait_for_room(tmp_path, monkeypatch):
    file, path = RecordFile(tmp_path / "metrics.jsonl", 0), tmp_path / "metrics.jsonl"
    file.write({"step": 1})

    class Full(io.FileIO):
        room = 20

        def write(self, line):
            if not self.room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            line = line[: self.room]
            self.room -= len(line)
            return super().write(line)

    monkeypatch.setattr(file, "_file", Full(path, "ab"))
    for step in (2, 3, 4):
        file.write({"step": step})
    assert [record["step"] for record in read_records(path)] == [1, 2]
    assert path.read_bytes().endswith(b"}\n")
    with pytest.raises(ValueError, match=r"cannot be written \(No space left on device\): make room"):
        file.close(0)
    file._file.room = 1000
    file.write({"step": 5})
    file.close(0)
    assert [record["step"] for record in read_records(path)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_is_taken_away_is_noticed_at_the_next_record(tmp_path, replaced):
    path = tmp_path / "metrics.jsonl"
    file = RecordFile(path, 0)
    file.write({"step": 1})
    path.unlink()
    if replaced:
        path.touch()
    with pytest.raises(ValueError, match=r"metrics\.jsonl was removed, moved or replaced"):
        file.write({"step": 2})
