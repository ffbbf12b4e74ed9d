"""Input on a real S3 server gives the data set that the same files give from the disk, whatever the connection does."""

import bz2
import gzip
import re
import shutil
import sys

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_prep import elsewhere
from data_prep.find import find_files
from data_prep.sources import parse_sources
from storage import remote
from storage.manifest import read_manifest
from storage.remote import Remote
from tests.data_prep.builds import build_here, contents, read
from tests.data_prep.texts import PROSE, write_lines
from tests.hub import hub
from tests.processes import free_port, run_cli
from tests.s3 import CuttingProxy, environment, require_rights, s3  # noqa: F401 (a fixture)

UNIT = 40_000


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """One file of each kind, and others that are none."""
    folder = tmp_path_factory.mktemp("corpus") / "corpus"
    (folder / "deep/er").mkdir(parents=True)
    lines = write_lines(folder / "a.jsonl", [{"text": text} for text in PROSE[:30]])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()[:60_000].rpartition(b"\n")[0]))
    (folder / "c.json.zst").write_bytes(zstandard.compress(b'[{"text": "one"}, {"text": "two"}]'))
    (folder / "d.txt.bz2").write_bytes(bz2.compress(PROSE[31].encode()))
    (folder / "deep" / "er" / "e.md").write_text(PROSE[32])
    (folder / "deep" / "f.csv").write_text("text\nthree\nfour\n")
    table = pa.table({"text": PROSE[33:60]})
    pq.write_table(table, folder / "g.parquet", row_group_size=7)
    datasets.Dataset.from_dict({"text": PROSE[60:64]}).save_to_disk(folder / "saved")
    (folder / "notes.pdf").write_bytes(b"none")
    (folder / ".hidden").write_bytes(b"none")
    return folder


@pytest.fixture(scope="module")
def place(corpus, s3):  # noqa: F811
    for path in corpus.rglob("*"):
        if path.is_file():
            Remote(f"s3://ours/corpus/{path.relative_to(corpus)}").put(path)
    return "s3://ours/corpus"


def without_files(left_out):
    return {(entry.path.rpartition("corpus/")[2], entry.reason, entry.size) for entry in left_out}


def test_the_same_data_set_as_from_the_disk(corpus, place, tokenizer_folder, tmp_path):
    here = build_here([corpus], tokenizer_folder, tmp_path / "here", unit_bytes=UNIT)
    there = build_here([place], tokenizer_folder, tmp_path / "there", unit_bytes=UNIT)
    assert there.fingerprint == here.fingerprint
    there_files, here_files = contents(tmp_path / "there"), contents(tmp_path / "here")
    there_files.pop("manifest.json")
    here_files.pop("manifest.json")
    ledgers = {name for name in here_files if name.startswith("tokens/unit-") and name.endswith(".json")}
    assert {n: h for n, h in there_files.items() if n not in ledgers} == {
        n: h for n, h in here_files.items() if n not in ledgers
    }  # of another plan, since the input has no times
    files, left_out = find_files(parse_sources([place], [])[0])
    files_here, left_out_here = find_files(parse_sources([str(corpus)], [])[0])
    assert [file[1:4] for file in files] == [file[1:4] for file in files_here]
    assert without_files(left_out) == without_files(left_out_here)


def test_patterns_and_single_files(corpus, place):
    for pattern in ("*.jsonl*", "**/*.md", "deep/f.csv", "g.parquet"):
        found, _ = read(f"{place}/{pattern}")
        expected, _ = read(f"{corpus}/{pattern}")
        assert found == expected, pattern


def test_a_file_of_a_web_server(corpus, place, s3):  # noqa: F811
    with pytest.raises(ValueError, match="no right to do this"):
        read(f"{s3}/ours/corpus/a.jsonl")
    Remote(place).files.chmod("ours", acl="public-read")
    for name in ("a.jsonl", "g.parquet"):
        Remote(f"{place}/{name}").files.chmod(f"ours/corpus/{name}", acl="public-read")
    for name in ("a.jsonl", "g.parquet"):
        found, _ = read(f"{s3}/ours/corpus/{name}")
        assert found == read(corpus / name)[0]
    with pytest.raises(ValueError, match="nothing"):
        read(f"{s3}/ours/corpus/nothing.jsonl")


def test_a_data_set_of_the_hub(corpus, tokenizer_folder, tmp_path):
    """By the command, since `huggingface_hub` reads the environment when it is imported."""
    with hub("me/texts", corpus.parent) as address:
        env = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
        flags = ["--tokenizer", tokenizer_folder, "--seq-length", "64", "--workers", "1"]
        for name, place in {"here": corpus, "there": "hf://datasets/me/texts/corpus"}.items():
            command = [sys.executable, "-m", "data_prep.build", "--input", place, *flags, "--output", tmp_path / name]
            done = run_cli(command, env=env)
            assert done.returncode == 0, done.stderr
        command[command.index(place)] = "hf://datasets/you/texts"
        refused = run_cli([*command[:-1], tmp_path / "refused"], env=env)
    assert refused.returncode == 2
    assert re.fullmatch(r"error: hf://datasets/you/texts: no right to do this \(.*\)[^\n]*\n", refused.stderr)
    here, there = (read_manifest(tmp_path / name) for name in ("here", "there"))
    assert here.fingerprint == there.fingerprint


def test_cut_connections_change_nothing(corpus, place, s3, monkeypatch):  # noqa: F811
    monkeypatch.setattr(elsewhere, "READ_BYTES", 16_384)
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.01)
    elsewhere._remote.cache_clear()
    with CuttingProxy(s3, 6, 9_000) as proxy, environment(AWS_ENDPOINT_URL=proxy.address):
        found, problems = read(place)
        assert proxy.cut == 6
    assert found == read(corpus)[0]
    assert not problems.count
    elsewhere._remote.cache_clear()


def test_a_server_that_is_gone_ends_the_build_and_is_no_damage(place, s3, monkeypatch):  # noqa: F811
    """With `skip`, too: nothing is left out for it. It goes in the middle of a file."""
    monkeypatch.setattr(elsewhere, "READ_BYTES", 16_384)
    monkeypatch.setattr(remote, "ATTEMPTS", 1)
    for name in ("a.jsonl", "b.jsonl.gz", "g.parquet"):
        gone, ranges = Remote._range, []

        def dies(self, begin, end, gone=gone, ranges=ranges):
            ranges.append(begin)
            if len(ranges) > 1:
                raise ConnectionResetError("the connection is lost")
            return gone(self, begin, end)

        with monkeypatch.context() as patch:
            patch.setattr(Remote, "_range", dies)
            with pytest.raises(ValueError, match=rf"{name} cannot be reached \(the connection is lost\)"):
                read(f"{place}/{name}", on_error="skip")


def test_a_file_that_changes_is_noticed_and_done_again(corpus, place, tokenizer_folder, tmp_path, s3):  # noqa: F811
    url = "s3://ours/changing/a.jsonl"
    held = (corpus / "a.jsonl").read_bytes()
    Remote(url).write(held)
    build_here([url], tokenizer_folder, tmp_path / "before")
    Remote(url).write(held.replace(b"the", b"THE"))  # as long as it was
    with pytest.raises(ValueError, match=r"changing/a.jsonl was modified after .* had been built from it"):
        build_here([url], tokenizer_folder, tmp_path / "before")
    shutil.copytree(tmp_path / "before", tmp_path / "unfinished")
    (tmp_path / "unfinished" / "manifest.json").unlink()
    build_here([url], tokenizer_folder, tmp_path / "unfinished")
    build_here([url], tokenizer_folder, tmp_path / "new")
    fingerprints = [read_manifest(tmp_path / name).fingerprint for name in ("before", "unfinished", "new")]
    assert fingerprints[0] != fingerprints[1] == fingerprints[2]


def test_what_is_not_there_or_not_ours_is_one_sentence(place, s3, monkeypatch):  # noqa: F811
    for wrong, words in {
        "s3://ours/nothing": "there is no file or folder s3://ours/nothing",
        "s3://nobucket/a": "nobucket/a does not exist",
        f"{place}/notes.pdf": "cannot be read as documents: none of the known suffixes",
    }.items():
        with pytest.raises(ValueError, match=words):
            read(wrong)
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0)
    with pytest.raises(ValueError, match="there is no file or folder http://"):
        read(f"{s3}/ours/nothing.jsonl")
    for wrong in (f"http://127.0.0.1:{free_port()}/a.jsonl", f"https{s3.removeprefix('http')}/ours/a.jsonl"):
        with pytest.raises(ValueError, match=r"/a.jsonl cannot be reached \(.*127.0.0.1"):
            read(wrong)
    require_rights(s3, 0)
    try:
        with pytest.raises(ValueError, match="no right to do this"):
            read(place)
    finally:
        require_rights(s3, "inf")
