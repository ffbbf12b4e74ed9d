"""A build in parts: whoever does which, killed or not, it makes what one process makes."""

import os
import re
import subprocess
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.plan import locked
from data_prep.records import Unit
from data_prep.units.parts import Share, joined_parts, part_from
from tests.data_prep.builds import (
    UNIT_BYTES,
    arguments,
    build_here,
    build_part_here,
    command,
    contents,
    failure,
    plan_of,
    run,
)
from tests.data_prep.texts import write_lines
from tests.processes import CODE, ROOT, clean_environment, run_cli

SBATCH = """#!/bin/bash
# The tasks of a job at once, to their end, with the variables of Slurm that they are told their share by.
while (($#)); do
    case $1 in
        --array=1-*) tasks=${1#--array=1-};;
        --wrap) shift; script=$1;;
        --parsable | --requeue | --dependency=afterany:17 | --cpus-per-task=*) ;;
        *) echo "unknown: $1" >&2; exit 1;;
    esac
    shift
done
[[ $tasks ]] || exec sh -c "$script" > slurm-18.out
export SLURM_ARRAY_TASK_COUNT=$tasks
for ((task = 1; task <= tasks; task++)); do SLURM_ARRAY_TASK_ID=$task sh -c "$script" 2> "slurm-17_$task.out" & done
wait
echo 17
"""


@given(st.lists(st.integers(1, 1000), max_size=40), st.integers(1, 9))
def test_parts_share_all_units_evenly(sizes, of):
    units = [Unit(number, "documents", number, number + 1, 0, 0, 0, size) for number, size in enumerate(sizes)]
    shares = [Share(number, of).of_units(units) for number in range(1, of + 1)]
    assert sorted(unit for share in shares for unit in share) == units
    work = [sum(unit.size for unit in share) for share in shares]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert max(work) - min(work) <= max(sizes, default=0)


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "1/0", "a/b", "1/3/4", "-1/3"])
def test_parts_that_there_are_not(text):
    with pytest.raises(ValueError, match=f"--part {text}: write I/N"):
        part_from(text)


def test_parts_at_once_and_killed_make_the_same(prose, tokenizer_folder, reference, tmp_path):
    output = tmp_path / "data"

    def start(part: str) -> subprocess.Popen:
        words, settings = command("build", *arguments(prose, tokenizer_folder, output, "--workers", 1, "--part", part))
        return subprocess.Popen(words, stderr=subprocess.PIPE, **settings)

    killed, *others = [start(part) for part in ("1/3", "2/3", "2/3")]  # one of them twice
    while not list((output / "tokens").glob("unit-*.json")) and killed.poll() is None:
        time.sleep(0.001)
    killed.kill()
    killed.communicate()
    said = [process.communicate()[1] for process in others]
    assert [process.returncode for process in others] == [0, 0], said
    times = {path: path.stat().st_mtime_ns for path in (output / "tokens").glob("unit-*.json")}
    assert len(times) >= len(reference_units := list((reference / "tokens").glob("unit-*.json"))) // 3
    build_part_here("3/3", [prose], tokenizer_folder, output, unit_bytes=UNIT_BYTES)
    done = run("build", *arguments(prose, tokenizer_folder, output, "--workers", 1))
    assert done.returncode == 0, done.stderr
    assert f"{len(reference_units):,} units of work" in done.stderr  # part 1 was left to this command
    assert contents(output) == contents(reference)
    assert times.items() <= {path: path.stat().st_mtime_ns for path in times}.items()
    done = run("build", *arguments(prose, tokenizer_folder, output, "--part", "3/3"))
    assert (done.returncode, "already complete" in done.stderr) == (0, True)


def test_the_last_part_says_what_is_to_be_done(tmp_path, tokenizer_folder, capsys):
    path = write_lines(tmp_path / "a.jsonl", [{"text": f"text {i}"} for i in range(50)])
    for part in ("2/2", "1/2"):
        build_part_here(part, [path], tokenizer_folder, tmp_path / "data", unit_bytes=200)
        said = capsys.readouterr().err
        assert f"part {part} has its" in said
        assert ("the same command without --part makes the data set" in said) == (part == "1/2")
    assert not (tmp_path / "data" / "manifest.json").exists()
    for name in ("data", "whole"):
        build_here([path], tokenizer_folder, tmp_path / name, unit_bytes=200)
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


def test_others_are_not_let_in_between_parts(tmp_path, tokenizer_folder):
    path, output = write_lines(tmp_path / "a.jsonl", [{"text": f"text {i}"} for i in range(50)]), tmp_path / "data"
    here = [path], tokenizer_folder, output
    plan, _ = plan_of([path], tokenizer_folder, unit_bytes=200)
    with joined_parts(output, plan, lambda: None):
        with pytest.raises(ValueError, match="another build is writing to"):
            build_here(*here, unit_bytes=200)
        with pytest.raises(ValueError, match=r"parts of another plan \(seed is 0 there and 1 here\)"):
            build_part_here("1/2", *here, unit_bytes=200, seed=1)
        os.utime(path, ns=(1, 1))
        with pytest.raises(ValueError, match=r"a.jsonl has another modification time here"):
            build_part_here("1/2", *here, unit_bytes=200)
    with locked(output), pytest.raises(ValueError, match="another build is writing to"):
        build_part_here("1/2", *here, unit_bytes=200)
    build_part_here("1/2", *here, unit_bytes=200, seed=1)  # nobody is there, and nothing is lost
    build_here(*here, unit_bytes=200, seed=1)
    assert contents(output)["manifest.json"]["seed"] == 1


def test_bad_input_ends_a_part_and_is_remembered(tmp_path, tokenizer_folder):
    path, output = tmp_path / "a.jsonl", tmp_path / "data"
    path.write_text('{"text": "one"}\n{"text": 1}\n')
    words = ["--input", path, "--tokenizer", tokenizer_folder, "--seq-length", 16, "--output", output, "--part", "1/1"]
    assert "line 2: field 'text' is not text" in failure(run("build", *words))
    assert '"failed": true' in (output / "plan.json").read_text()


def test_array_of_slurm_as_the_readme_has_it(prose, tokenizer_folder, reference, tmp_path):
    readme = (ROOT / "README.md").read_text()
    (script,) = [block for block in re.findall(r"```bash\n(.*?)```", readme, re.DOTALL) if "sbatch --parsable" in block]
    changes = {"--array=1-8": "--array=1-2", "--workers 16": "--workers 1", "--seq-length 512": "--seq-length 128"}
    for before, after in changes.items():
        assert before in script
        script = script.replace(before, after)
    script = script.replace("--output data", f"--output data --unit-bytes {UNIT_BYTES} --encoder plain", 1)
    for name in CODE:
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / prose.name).symlink_to(prose)
    (tmp_path / "tokenizer").symlink_to(tokenizer_folder)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sbatch").write_text(SBATCH)
    (tmp_path / "bin/sbatch").chmod(0o755)
    path = os.pathsep.join([str(tmp_path / "bin"), clean_environment()["PATH"]])
    done = run_cli(["bash", "-euc", script], cwd=tmp_path, env={"PATH": path})
    assert done.returncode == 0, done.stdout + done.stderr
    for task in (1, 2):
        assert f"part {task}/2 has its" in (tmp_path / f"slurm-17_{task}.out").read_text()
    assert contents(tmp_path / "data") == contents(reference)
