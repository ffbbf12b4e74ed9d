"""Packing a token store again gives what a build from the text gives, and refuses stores that cannot be trusted."""

import hashlib
import json
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.build import How, build
from data_prep.plan import BuildOptions, Plan, locked
from data_prep.repack import repack
from data_prep.sources import parse_sources
from data_prep.tokenizer import open_tokenizer
from data_prep.verify import problems
from storage.manifest import PackingPolicy, read_manifest
from tests.data_prep.builds import UNIT_BYTES, build_here, command, contents, failure, run
from tests.data_prep.test_cut import CHINESE
from tests.data_prep.test_verify import flip_bit, remove, shorten
from tests.data_prep.texts import DEEPSEEK, MISTRAL, PROSE, awkward, write_lines
from tests.properties import examples

# --- the same bytes ---------------------------------------------------------------------------------------------------


@st.composite
def policies(draw) -> PackingPolicy:
    length, kind = draw(st.integers(4, 90)), draw(st.sampled_from(["bestfit", "structure", "concat"]))
    options = {"concat": {"policy": "concat"}, "bestfit": {"overlap": draw(st.integers(1, length))}}
    structure = {
        "cut": "structure",
        "cut_tolerance": draw(st.floats(0.01, 0.4)),
        "overlap": draw(st.integers(1, length // 2)),
    }
    return PackingPolicy(seq_length=length, **options.get(kind, structure))


texts = st.lists(st.one_of(awkward, st.sampled_from([*PROSE[:5], CHINESE[:900]])), min_size=1, max_size=9)


@given(texts, policies(), policies(), st.sampled_from([None, 200]), st.booleans())
@examples(10)
def test_packed_again_it_is_what_a_build_makes(tmp_path_factory, tokenizer_folder, texts, first, second, units, remove):
    folder = tmp_path_factory.mktemp("repack")
    path = write_lines(folder / "a.jsonl", [{"text": text} for text in ["some text", "more", *texts]])
    options = {"unit_bytes": units, "deduplicate": remove, "validation_fraction": 0.3}
    for name, policy in (("one", first), ("two", second)):
        build_here([path], tokenizer_folder, folder / name, **options, **policy.model_dump())
    manifest = repack(folder / "one", second, folder / "again", workers=1)
    assert contents(folder / "again") == contents(folder / "two")
    assert manifest.fingerprint == read_manifest(folder / "two").fingerprint
    assert manifest.repacked_from == read_manifest(folder / "one").fingerprint
    assert [problem for _, problem in problems(folder / "again", full=True) if problem] == []
    repack(folder / "again", first, folder / "back", workers=1)
    assert contents(folder / "back") == contents(folder / "one")


def test_weights_of_sources_skipped_records_and_uint32_are_kept(tmp_path):
    places = []
    for name in ("books", "web"):
        (tmp_path / name).mkdir()
        write_lines(
            tmp_path / name / "a.jsonl", [*({"text": f"{name} {i} {PROSE[i][:300]}"} for i in range(9)), {"text": 1}]
        )
        places.append(f"{name}={tmp_path / name}:{len(name)}")
    (tmp_path / "web" / "b.jsonl").write_text("")  # a unit without documents
    tokenizer = open_tokenizer(DEEPSEEK)
    for name, length in (("one", 16), ("two", 40)):
        options = BuildOptions(packing=PackingPolicy(seq_length=length), unit_bytes=1000)
        build(Plan(parse_sources([], places), options, tokenizer), tokenizer, tmp_path / name, How(1, "skip", "plain"))
    done = run("repack", tmp_path / "one", "--seq-length", 40, "--output", tmp_path / "again")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "again") == contents(tmp_path / "two")
    manifest = read_manifest(tmp_path / "again")
    assert {name: entry.weight for name, entry in manifest.splits["train"].items()} == {"books": 5, "web": 3}
    (line,) = [line for line in done.stdout.splitlines() if "packed again from" in line]
    assert read_manifest(tmp_path / "one").fingerprint in line


def test_options_that_are_not_given_stay_unless_what_they_depend_on_changes(reference, tmp_path):
    words = ["--cut", "structure", "--cut-tolerance", 0.2, "--overlap", 3, "--tail", "drop"]
    for given_, parent, name in ((words, reference, "one"), (["--seq-length", 64], tmp_path / "one", "two")):
        assert run("repack", parent, *given_, "--output", tmp_path / name).returncode == 0
    kept = {"cut": "structure", "cut_tolerance": 0.2, "overlap": 3, "tail": "drop"}
    assert read_manifest(tmp_path / "two").packing == PackingPolicy(seq_length=64, **kept)
    assert run("repack", tmp_path / "two", "--packing", "concat", "--output", tmp_path / "three").returncode == 0
    assert read_manifest(tmp_path / "three").packing == PackingPolicy(seq_length=64, policy="concat", tail="drop")
    words = ["--seq-length", 2, "--output", tmp_path / "four"]
    assert "overlap 3 must not exceed seq_length 2" in failure(run("repack", tmp_path / "two", *words))
    assert not (tmp_path / "four").exists()


@pytest.mark.parametrize("linked", [True, False])
def test_it_does_not_need_the_first_data_set(reference, tmp_path, monkeypatch, linked):
    if not linked:

        def refuse(*_):
            raise OSError(18, "Invalid cross-device link")

        monkeypatch.setattr(Path, "hardlink_to", refuse)
    first = shutil.copytree(reference, tmp_path / "first")
    repack(first, PackingPolicy(seq_length=64), tmp_path / "again")
    units = [folder / "tokens" / "unit-00000.arrow" for folder in (first, tmp_path / "again")]
    assert units[0].samefile(units[1]) == linked
    shutil.rmtree(first)
    assert [problem for _, problem in problems(tmp_path / "again", full=True) if problem] == []
    repack(tmp_path / "again", PackingPolicy(seq_length=128), tmp_path / "back")
    assert contents(tmp_path / "back") == contents(reference)


def test_killed_at_any_moment_it_continues(reference, prose, tokenizer_folder, tmp_path):
    build_here([prose], tokenizer_folder, tmp_path / "built", unit_bytes=UNIT_BYTES, seq_length=32)
    output = tmp_path / "again"
    words, settings_ = command("repack", reference, "--seq-length", 32, "--output", output)
    for place in ("tokens/unit-00000.json", "tokens/unit-00009.json", "train", "train/state.json"):
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **settings_)
        while process.poll() is None and not (output / place).exists():
            time.sleep(0.0005)
        process.kill()
        process.communicate()
    done = subprocess.run(words, capture_output=True, **settings_)
    assert done.returncode == 0, done.stderr
    assert contents(output) == contents(tmp_path / "built")
    assert not list(output.rglob("*.tmp"))


# --- refusals ---------------------------------------------------------------------------------------------------------


def change_plan(path: Path) -> None:
    stored = json.loads(path.read_text())
    stored["plan"]["version"] = 99
    path.write_text(json.dumps(stored))


def change_ledger(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"plan_sha256": hashlib.sha256(b"other").hexdigest()}))


def exchange_tokenizer(path: Path) -> None:
    shutil.copy(MISTRAL, path)


UNIT, LEDGER = "tokens/unit-00002.arrow", "tokens/unit-00002.json"
DAMAGE = [
    (remove, "manifest.json", "is not a prepared data set"),
    (remove, UNIT, "unit-00002.arrow is missing"),
    (shorten, UNIT, "unit-00002.arrow has"),
    (flip_bit, UNIT, "unit-00002.arrow has changed: its sha256 is not its ledger's"),
    (remove, LEDGER, "the ledger of unit-00002.arrow, is missing or damaged"),
    (shorten, LEDGER, "the ledger of unit-00002.arrow, is missing or damaged"),
    (change_ledger, LEDGER, "unit-00002.json belongs to another data set"),
    (remove, "tokens/index.arrow", "is not a complete token store"),
    (flip_bit, "tokens/index.arrow", "index.arrow does not list the documents of the manifest"),
    (shorten, "plan.json", "plan.json is damaged"),
    (remove, "plan.json", "plan.json is gone"),
    (change_plan, "plan.json", "was built by another version of this program (plan version 99, this one has 1)"),
    (exchange_tokenizer, "tokenizer/tokenizer.model", "tokenizer.model is not the tokenizer that made this data set"),
]


@pytest.mark.parametrize(("damage", "file", "sentence"), DAMAGE)
def test_a_store_that_cannot_be_trusted_is_refused(reference, tmp_path, damage, file, sentence):
    data = shutil.copytree(reference, tmp_path / "data")
    damage(data / file)
    with pytest.raises(ValueError) as error:
        repack(data, PackingPolicy(seq_length=64), tmp_path / "again")
    assert sentence in str(error.value)
    assert not (tmp_path / "again" / "manifest.json").exists()


def test_a_unit_of_another_store_is_refused(reference, prose, tokenizer_folder, tmp_path):
    data = shutil.copytree(reference, tmp_path / "data")
    for name in ("unit-00001.arrow", "unit-00001.json"):
        shutil.copy(data / "tokens" / name.replace("1", "2"), data / "tokens" / name)
    with pytest.raises(ValueError, match=r"unit-00001.json belongs to another data set"):
        repack(data, PackingPolicy(seq_length=64), tmp_path / "again")


def test_outputs_of_another_plan_in_use_or_complete(reference, tmp_path):
    before = contents(reference)
    assert "packing.seq_length is 128 there and 64 here" in failure(
        run("repack", reference, "--seq-length", 64, "--output", reference)
    )
    done = run("repack", reference, "--output", reference)
    assert (done.returncode, "already complete" in done.stderr) == (0, True)
    with locked(tmp_path / "again"):
        words = ["--seq-length", 64, "--output", tmp_path / "again"]
        assert "another build is writing to" in failure(run("repack", reference, *words))
    assert contents(reference) == before
