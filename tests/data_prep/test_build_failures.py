"""Odd input, refusals, and failures of the machine."""

import gzip
import json
import os
import re
import resource
import signal
import subprocess
import time
from functools import partial

import psutil
import pytest

from data_prep.plan import locked
from data_prep.repack import repack
from data_prep.verify import problems
from storage.manifest import PackingPolicy, read_manifest
from tests.data_prep.builds import UNIT_BYTES, arguments, build_here, command, contents, failure, run
from tests.data_prep.texts import write_lines, write_prose

# --- odd input --------------------------------------------------------------------------------------------------------


def test_bad_and_empty_records(tmp_path, tokenizer_folder):
    path = tmp_path / "a.jsonl"
    good = [json.dumps({"text": text}) for text in ("one", "", " \n\t", "two", "x" * 100_000, "last")]
    path.write_text("\n".join([*good, '{"text": 1}', "nonsense"]))
    words = ["--input", path, "--tokenizer", tokenizer_folder, "--seq-length", 16, "--output", tmp_path / "data"]
    assert f"{path} line 7: field 'text' is not text" in failure(run("build", *words, "--workers", 1))
    assert not (tmp_path / "data" / "manifest.json").exists()
    done = run("build", *words, "--workers", 1, "--on-error", "skip")
    assert done.returncode == 0, done.stderr
    given = read_manifest(tmp_path / "data").statistics["input"]
    assert (given["documents"], given["empty"]) == (4, 2)
    assert given["skipped"] == {"field 'text' is not text": 1, "invalid JSON": 1}
    assert "2 empty, 1 field 'text' is not text, 1 invalid JSON" in done.stdout
    assert f"{path} line 8: invalid JSON" in done.stdout


@pytest.mark.parametrize(
    ("texts", "options", "words"),
    [
        (["", " "], {}, "the input holds no text: 2 empty documents"),
        (["only"], {}, "1 document(s) leave none for validation"),
        (["a", "b"], {"tail": "drop", "validation_fraction": 0}, "do not fill one row of 129"),
    ],
)
def test_too_little_text(tmp_path, tokenizer_folder, texts, options, words):
    path = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    with pytest.raises(ValueError, match=re.escape(words)):
        build_here([path], tokenizer_folder, tmp_path / "data", **{"policy": "concat"} | options)
    assert not (tmp_path / "data" / "manifest.json").exists()


def test_few_documents_still_have_a_validation_split(tmp_path, tokenizer_folder):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b"}])
    manifest = build_here([path], tokenizer_folder, tmp_path / "data", validation_fraction=1e-9)
    assert {name: split["documents"].documents for name, split in manifest.splits.items()} == {
        "train": 1,
        "validation": 1,
    }
    manifest = build_here([path], tokenizer_folder, tmp_path / "none", validation_fraction=0)
    assert set(manifest.splits) == {"train"}


def test_a_validation_split_of_next_to_nothing_is_said(tmp_path, tokenizer_folder, capsys):
    texts = [f"text {number} of some words, and of some more" for number in range(200)]
    path = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    for number, (options, few) in enumerate(
        (
            ({}, True),
            ({"seq_length": 8, "validation_fraction": 0.05}, True),
            ({"validation_fraction": 0}, False),
            ({"validation_fraction": 0.9}, False),
        )
    ):
        capsys.readouterr()
        manifest = build_here([path], tokenizer_folder, tmp_path / str(number), **options)
        said = [line for line in capsys.readouterr().err.splitlines() if "its loss will be noise" in line]
        assert len(said) == few
        if few:
            split = manifest.splits["validation"]["documents"]
            assert said[0].startswith(f"validation has {split.rows} row")
            assert f" with {split.targets} targets: " in said[0]


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_another_plan_is_refused_and_named(prose, tokenizer_folder, reference, tmp_path):
    before = contents(reference)
    words = arguments(prose, tokenizer_folder, reference, "--seq-length", 64, "--seed", 5)
    sentence = failure(run("build", *words, "--workers", 1))
    assert "packing.seq_length is 128 there and 64 here; seed is 0 there and 5 here" in sentence
    other = write_prose(tmp_path / "prose.jsonl", copies=2)
    sentence = failure(run("build", *arguments(other, tokenizer_folder, reference), "--workers", 1))
    assert "sources.documents.files differ, the first is prose.jsonl" in sentence
    done = run("build", *arguments(prose, tokenizer_folder, reference), "--workers", 1)
    assert done.returncode == 0
    assert "already complete" in done.stderr
    assert contents(reference) == before


def test_input_modified_without_a_change_of_size(tmp_path, tokenizer_folder):
    path, output = write_lines(tmp_path / "a.jsonl", [{"text": f"text {i}"} for i in range(50)]), tmp_path / "data"
    build_here([path], tokenizer_folder, output, unit_bytes=200)
    path.write_text(path.read_text().replace("text 7", "TEXT 7"))
    os.utime(path, ns=(1, 1))
    with pytest.raises(ValueError, match=r"a.jsonl was modified after .* had been built"):
        build_here([path], tokenizer_folder, output, unit_bytes=200)
    (output / "manifest.json").unlink()  # as if the build had been interrupted
    build_here([path], tokenizer_folder, output, unit_bytes=200)
    build_here([path], tokenizer_folder, tmp_path / "fresh", unit_bytes=200)
    assert contents(output) == contents(tmp_path / "fresh")


def test_outputs_that_are_not_ours(prose, tokenizer_folder, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("x")
    with pytest.raises(ValueError, match=r"not empty and no build of this program \(precious.txt\)"):
        build_here([prose], tokenizer_folder, tmp_path / "full")
    with pytest.raises(ValueError, match="is not a folder"):
        build_here([prose], tokenizer_folder, tmp_path / "full" / "precious.txt")
    with locked(tmp_path / "data"):
        words = arguments(prose, tokenizer_folder, tmp_path / "data", "--workers", 1)
        assert "another build is writing to" in failure(run("build", *words))


def test_options_that_make_no_sense(prose, tokenizer_folder, tmp_path):
    words = arguments(prose, tokenizer_folder, tmp_path / "data")
    done = run("build", *words, "--overlap", 500, "--workers", 1)
    assert "overlap 500 must not exceed seq_length 128" in failure(done)
    assert "--validation-fraction" in failure(run("build", *words, "--validation-fraction", 1.5))
    assert "--workers 0: at least 1" in failure(run("build", *words, "--workers", 0))
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("texts", "options", "words", "remedy"),
    [
        (["only"], {}, "--validation-fraction 0 does without", {"validation_fraction": 0}),
        (["a", "b"], {"tail": "drop"}, "use --tail pad or a smaller --seq-length", {"tail": "pad"}),
        (["a", "b"], {"tail": "drop"}, "use --tail pad or a smaller --seq-length", {"tail": "drop", "seq_length": 1}),
    ],
)
def test_the_remedy_that_a_refusal_names_works_in_the_same_folder(
    tmp_path, tokenizer_folder, texts, options, words, remedy
):
    path, output = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in texts]), tmp_path / "data"
    with pytest.raises(ValueError, match=words):
        build_here([path], tokenizer_folder, output, **{"policy": "concat"} | options)
    build_here([path], tokenizer_folder, output, **{"policy": "concat"} | remedy)
    build_here([path], tokenizer_folder, tmp_path / "fresh", **{"policy": "concat"} | remedy)
    assert contents(output) == contents(tmp_path / "fresh")


def test_what_was_left_out_once_is_an_error_without_skip(tmp_path, tokenizer_folder):
    path, output = write_lines(tmp_path / "a.jsonl", [{"text": f"text {i}"} for i in range(9)]), tmp_path / "data"
    path.write_bytes(path.read_bytes() + b"nonsense\n" + path.read_bytes())
    build_here([path], tokenizer_folder, output, on_error="skip", unit_bytes=50)
    (output / "manifest.json").unlink()  # as if the build had been interrupted
    with pytest.raises(ValueError, match=r"a.jsonl line 10: invalid JSON .*; --on-error skip leaves such records out"):
        build_here([path], tokenizer_folder, output, unit_bytes=50)
    build_here([path], tokenizer_folder, output, on_error="skip", unit_bytes=50)
    build_here([path], tokenizer_folder, tmp_path / "fresh", on_error="skip", unit_bytes=50)
    assert contents(output) == contents(tmp_path / "fresh")


def test_an_unfinished_data_set_keeps_its_units(tmp_path, tokenizer_folder):
    records = [{"text": f"text {i}"} for i in range(50)]
    path, output = write_lines(tmp_path / "a.jsonl", records), tmp_path / "data"
    build_here([path], tokenizer_folder, output, unit_bytes=200)
    (output / "manifest.json").unlink()  # as if the build had been interrupted
    units = {unit: unit.stat().st_mtime_ns for unit in (output / "tokens").glob("unit-*.arrow")}
    for change in ({"seed": 1}, {"text_field": "body"}, {"unit_bytes": 300}):
        with pytest.raises(ValueError, match="was begun with another plan"):
            build_here([path], tokenizer_folder, output, **{"unit_bytes": 200} | change)
    with pytest.raises(ValueError, match=r"sources.documents.files differ"):
        build_here([write_lines(tmp_path / "b.jsonl", records[:-1])], tokenizer_folder, output, unit_bytes=200)
    build_here([path], tokenizer_folder, output, unit_bytes=200, seq_length=64)  # only packed in another way
    assert {unit: unit.stat().st_mtime_ns for unit in (output / "tokens").glob("unit-*.arrow")} == units
    build_here([path], tokenizer_folder, tmp_path / "fresh", unit_bytes=200, seq_length=64)
    assert contents(output) == contents(tmp_path / "fresh")


# --- what lies beside the documents -----------------------------------------------------------------------------------


def test_what_is_not_read_is_named_wherever_a_data_set_is_described(tokenizer_folder, tmp_path):
    """The output, too, may lie in the input. None of it decides the fingerprint."""
    folder = tmp_path / "documents"
    folder.mkdir()
    write_lines(folder / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    small = gzip.compress(b'{"text": "a"}\n') + b"rubbish"
    (folder / "small.jsonl.gz").write_bytes(small)
    words = ["--input", folder, "--tokenizer", tokenizer_folder, "--seq-length", 128, "--workers", 1]
    before = build_here([folder], tokenizer_folder, folder / "data")
    assert build_here([folder], tokenizer_folder, folder / "data") == before
    behind = f"not read     1 file (7 bytes), something else behind compressed data: {folder / 'small.jsonl.gz'}"
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "notes.doc").write_text("12345")
    (folder / os.fsdecode(b"\xff.doc")).write_text("12345")
    done = run("build", *words, "--output", tmp_path / "data", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(tmp_path / "data")
    assert manifest.fingerprint == before.fingerprint
    size = sum(path.stat().st_size for path in (folder / "data").rglob("*") if path.is_file())
    count = sum(path.is_file() for path in (folder / "data").rglob("*"))
    named = [
        f"not read     1 file (0 bytes), a FIFO: {folder / 'pipe.jsonl'}",
        f"not read     {count} files ({size:,} bytes), a data set of this program: {folder / 'data'}",
        f"not read     2 files (10 bytes), none of the known suffixes: {folder / 'notes.doc'}, {folder}/\\udcff.doc",
        behind,
    ]
    assert [line for line in named if line not in lines_of(done.stdout)] == [], done.stdout
    assert repack(tmp_path / "data", PackingPolicy(seq_length=64), tmp_path / "again").left_out == manifest.left_out
    assert set(named) <= {*lines_of(run("inspect", tmp_path / "again").stdout)}
    assert not any(problem for _, problem in problems(tmp_path / "again", full=True))


def lines_of(text: str) -> list[str]:
    """Tables have spaces of their own."""
    return [re.sub("^ *not read +", "not read     ", line).rstrip() for line in text.splitlines()]


# --- failures of the machine ------------------------------------------------------------------------------------------


def test_a_full_disk_is_one_sentence(prose, tokenizer_folder, reference, tmp_path):
    output = tmp_path / "data"
    words, settings = command("build", *arguments(prose, tokenizer_folder, output, "--workers", 1))
    largest = max(path.stat().st_size for path in (reference / "tokens").glob("*.arrow"))

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1000, resource.RLIM_INFINITY))

    done = subprocess.run(words, preexec_fn=limit, capture_output=True, **settings)
    assert "the file size limit is reached" in failure(done)
    assert not list(output.rglob("*.tmp"))
    assert not (output / "manifest.json").exists()
    done = subprocess.run(words, capture_output=True, **settings)
    assert done.returncode == 0
    assert contents(output) == contents(reference)


def start_with_workers(prose, tokenizer_folder, output) -> tuple[subprocess.Popen, list[psutil.Process]]:
    words, settings = command("build", *arguments(prose, tokenizer_folder, output, "--workers", 2))
    # a shell's background jobs, the test run perhaps, ignore Ctrl-C
    obey = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(words, stderr=subprocess.PIPE, start_new_session=True, preexec_fn=obey, **settings)
    while not list((output / "tokens").glob("unit-*.json")):
        assert process.poll() is None
        time.sleep(0.005)
    workers = [p for p in psutil.Process(process.pid).children() if "spawn_main" in " ".join(p.cmdline())]
    return process, workers


@pytest.fixture(scope="module")
def much_prose(tmp_path_factory):
    return write_prose(tmp_path_factory.mktemp("much") / "prose.jsonl", copies=20)


def test_a_dead_worker_fails_the_run(much_prose, tokenizer_folder, tmp_path):
    process, workers = start_with_workers(much_prose, tokenizer_folder, tmp_path / "data")
    os.kill(workers[0].pid, signal.SIGKILL)
    _, words = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "a worker process died, most often because memory ran out" in words
    assert "Traceback" not in words
    assert not (tmp_path / "data" / "manifest.json").exists()


def test_ctrl_c_leaves_nothing_half_written(much_prose, tokenizer_folder, tmp_path):
    process, workers = start_with_workers(much_prose, tokenizer_folder, tmp_path / "data")
    os.killpg(process.pid, signal.SIGINT)
    _, words = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted: run the same command again to continue" in words
    assert "Traceback" not in words
    assert psutil.wait_procs(workers, timeout=20)[1] == []
    assert not list((tmp_path / "data").rglob("*.tmp"))


def test_an_error_in_a_worker_names_its_place(much_prose, tokenizer_folder, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(much_prose.read_bytes()[: 2 * UNIT_BYTES] + b"\n" + b"nonsense\n" * 3)
    done = run("build", *arguments(path, tokenizer_folder, tmp_path / "data", "--workers", 2))
    assert re.search(r"a\.jsonl line \d+: invalid JSON", failure(done))


@pytest.mark.parametrize("module", ["build", "inspect", "repack", "tokenizer", "verify"])
def test_ctrl_c_while_libraries_are_imported(tmp_path, module):
    for library in ("numpy", "pydantic", "rich", "sentencepiece"):
        lines = "import os, signal, time\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(9)\n"
        (tmp_path / f"{library}.py").write_text(f"{lines}except BaseException:\n    raise ImportError\n")
    words, settings = command(module, "--help", PYTHONPATH=str(tmp_path))
    obey = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    done = subprocess.run(words, capture_output=True, preexec_fn=obey, timeout=60, **settings)
    assert (done.returncode, done.stderr) == (130, "interrupted: run the same command again to continue\n")


def test_help_names_the_defaults():
    done = run("build", "--help")
    assert done.returncode == 0
    text = " ".join(done.stdout.split())
    for words in ("--validation-fraction", "(default: 0.01)", "(default: bestfit)", "--on-error", "--workers"):
        assert words in text
