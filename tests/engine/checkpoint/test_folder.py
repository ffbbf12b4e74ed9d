"""Which folder counts as a checkpoint, and which one is taken."""

import contextlib
import errno
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from engine.checkpoint.folder import find, newest_good
from engine.checkpoint.manifest import (
    CheckpointManifest,
    StateLayout,
    folder_name,
    read_manifest,
    seal,
    step_of,
    steps,
    unseal,
)
from engine.checkpoint.retention import Retention, set_aside
from engine.safe_load import load_file
from tests.properties import examples
from training.config import CheckpointConfig
from training.state import TrainState

TOKENIZER = {"type": "sentencepiece", "file": "t.model", "sha256": "0" * 64, "vocab_size": 32}
TOKENIZER |= {"bos_id": 1, "eos_id": 2, "pad_id": 0, "mask_id": None}
SOURCES = {"books": {"documents": 3, "bytes": 5000, "tokens": 1000}}
DATA = {"path": "/data", "fingerprint": "f", "seq_length": 64, "tokenizer": TOKENIZER, "sources": SOURCES}
MODEL = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TRAINED = {"model": MODEL, "optimizer": {"lr": 1e-3}, "training": {"seed": 0, "global_batch_tokens": 512}}


def write(run: Path, step: int, skips: int = 0) -> Path:
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    contents = {"weights.pt": bytes([step]) * 1000, "optimizer.pt": bytes([step + 1]) * 500}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    manifest = CheckpointManifest(
        layout=StateLayout(zero_stage=2, world_size=2, wrapper="W", optimizer="O"),
        state=TrainState(
            data_fingerprint="f",
            seed=0,
            step=step,
            consumed_samples=8 * step,
            consumed_tokens=512 * step,
            batches=[(step, 8, 512)],
            skipped_steps=skips,
            consecutive_skipped_steps=skips,
            wandb_id="w",
        ),
        recipe=TRAINED,
        ds_config={"zero_optimization": {"stage": 2}},
        environment={"torch": "2"},
        data=DATA | {"stages": [DATA | {"name": "all", "first_step": 1, "last_step": 100, "weights": None}]},
        files={name: (len(content), xxhash.xxh3_128(content).hexdigest()) for name, content in contents.items()},
        created="now",
    )
    (folder / "manifest.json").write_bytes(seal(manifest))
    return folder


def flip(path: Path) -> None:
    """Damage that leaves the size as it was."""
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)
    os.utime(path, ns=(0, 0))  # within one tick of the file system's clock it could not be told from the write before


DAMAGES = {
    "missing file": (lambda folder: (folder / "weights.pt").unlink(), "missing"),
    "shorter file": (lambda folder: (folder / "weights.pt").write_bytes(b"x"), "1 bytes instead of 1000"),
    "flipped bit": (lambda folder: flip(folder / "optimizer.pt"), "content has changed"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "not a finished checkpoint"),
    "torn manifest": (lambda folder: (folder / "manifest.json").write_text('{"format'), "damaged"),
    "foreign manifest": (lambda folder: (folder / "manifest.json").write_text("{}"), "damaged"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_seen_and_the_one_before_taken(tmp_path, kind):
    good, bad = write(tmp_path, 5), write(tmp_path, 10)
    assert read_manifest(bad).state.step == 10
    damage, words = DAMAGES[kind]
    damage(bad)
    with pytest.raises(ValueError, match=words):
        read_manifest(bad)
    folder, manifest, passed_over = newest_good(tmp_path)
    assert (folder, manifest.state.step) == (good, 5)
    assert len(passed_over) == 1
    assert words in passed_over[0]
    assert find(tmp_path)[0] == good


def test_quick_check_reads_no_content(tmp_path):
    folder = write(tmp_path, 5)
    flip(folder / "weights.pt")
    assert read_manifest(folder, full=False).state.step == 5


def test_nothing_and_nothing_good_are_different(tmp_path):
    assert newest_good(tmp_path) is None
    with pytest.raises(ValueError, match="has no checkpoint"):
        find(tmp_path)
    (write(tmp_path, 5) / "weights.pt").unlink()
    with pytest.raises(ValueError, match="every checkpoint is damaged"):
        newest_good(tmp_path)


def test_a_step_can_be_chosen(tmp_path):
    write(tmp_path, 5)
    write(tmp_path, 10)
    assert find(tmp_path, 5)[1].state.step == 5
    with pytest.raises(ValueError, match="no checkpoint of step 7; there are: 5, 10"):
        find(tmp_path, 7)


def test_an_interrupted_save_or_deletion_is_no_checkpoint(tmp_path):
    good = write(tmp_path, 5)
    (tmp_path / "checkpoints/.step-00000010.partial").mkdir()
    assert steps(tmp_path) == [good]


def damage(folder: Path, kind: str) -> None:
    DAMAGES[kind][0](folder)


def rename(folder: Path, name: str) -> None:
    folder.rename(folder.with_name(name))


def copy(folder: Path, name: str) -> None:
    if not folder.with_name(name).exists():
        shutil.copytree(folder, folder.with_name(name))


ACCIDENTS = st.one_of(
    st.tuples(st.just(damage), st.sampled_from(sorted(DAMAGES))),
    st.tuples(st.just(rename), st.sampled_from(["best", "step-old", "step-00000099.bak", "step-1"])),
    st.tuples(st.just(copy), st.sampled_from(["step-00000099", "step-00000098", "best.copy", "step-00000097.bak"])),
)
EVENTS = st.lists(st.one_of(st.booleans(), st.tuples(st.integers(0, 4), ACCIDENTS)), max_size=14)


@examples(60)
@given(EVENTS, st.integers(2, 3), st.sampled_from([None, 3]))
def test_the_newest_good_state_is_always_there(tmp_path_factory, events, keep_last, keep_every):
    """Saves (of applied or of skipped steps), each followed by retention, between accidents to what lies there."""
    run, policy = tmp_path_factory.mktemp("run"), CheckpointConfig(keep_last=keep_last, keep_every_steps=keep_every)
    retention = Retention(run, policy)
    good, step = {}, 0  # good: intact checkpoints, by step, and whether their steps were applied
    for event in events:
        if isinstance(event, bool):
            step += 1
            written = write(run, step, skips=0 if event else 1)
            good[step] = event
            retention.retire(written)
            assert written.is_dir()
            healthy = [number for number in sorted(good, reverse=True) if good[number]]
            for number in healthy[:keep_last]:  # counted from the newest, whatever else lies there
                read_manifest(run / "checkpoints" / folder_name(number))
            kept = [step_of(folder) for folder in steps(run)]
            good = {number: applied for number, applied in good.items() if number in kept}
        elif folders := steps(run):
            folder = folders[event[0] % len(folders)]
            accident, how = event[1]
            number = step_of(folder)
            with contextlib.suppress(FileNotFoundError, OSError):
                accident(folder, how)
            with contextlib.suppress(ValueError):
                read_manifest(run / "checkpoints" / folder_name(number))
                continue
            good.pop(number, None)
        if good:
            assert newest_good(run)[1].state.step == max(good)


def test_a_name_that_is_not_the_state_s_is_never_the_newest(tmp_path):
    for step in (5, 10):
        write(tmp_path, step)
    copy(steps(tmp_path)[0], "step-00000099")
    copy(steps(tmp_path)[1], "step-00000010.bak")
    rename(steps(tmp_path)[1], "best")
    folder, manifest, words = newest_good(tmp_path)
    assert (folder.name, manifest.state.step) == ("step-00000005", 5)
    assert [name in " ".join(words) for name in ("step-00000099", "step-00000010.bak", "best")] == [True] * 3
    with pytest.raises(ValueError, match="holds step 10, so it was renamed or copied"):
        find(tmp_path, 99)


def test_going_back_moves_later_checkpoints_aside(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step)
    with pytest.raises(ValueError, match="has no checkpoint of step 7; there are: 1, 2, 3"):
        set_aside(tmp_path, 7)
    flip(steps(tmp_path)[2] / "weights.pt")
    with pytest.raises(ValueError, match="content has changed"):
        set_aside(tmp_path, 1)
    assert [step_of(folder) for folder in steps(tmp_path)] == [3, 2, 1]
    for _ in range(2):
        assert [folder.name.partition(".")[0] for folder in set_aside(tmp_path, 2)] == ["step-00000003"]
        assert newest_good(tmp_path)[1].state.step == 2
        assert set_aside(tmp_path, 2) == []
        write(tmp_path, 3)
    assert {path.name for path in (tmp_path / "set_aside").iterdir()} == {"step-00000003", "step-00000003.2"}


def test_no_flipped_bit_of_a_manifest_is_believed(tmp_path):
    content = (write(tmp_path, 5) / "manifest.json").read_bytes()
    original, generator = unseal(content), random.Random(0)
    for _ in range(10_000):
        damaged, bit = bytearray(content), generator.randrange(8 * len(content))
        damaged[bit // 8] ^= 1 << bit % 8
        with contextlib.suppress(ValueError):
            assert unseal(bytes(damaged)) == original


def test_a_manifest_of_the_first_format_is_read_and_said(tmp_path):
    folder = write(tmp_path, 5)
    fields = json.loads((folder / "manifest.json").read_bytes())
    del fields["digest"]
    with pytest.raises(ValueError, match="own digest differs"):
        unseal(json.dumps(fields).encode())
    (folder / "manifest.json").write_text(json.dumps(fields | {"format_version": 1}))
    _, manifest, words = newest_good(tmp_path)
    assert manifest.state.step == 5
    assert "older version" in words[0]


class Payload:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def test_code_in_a_file_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"module": Payload()}, "mp_rank_00_model_states.pt")
    with pytest.raises(ValueError, match="is not opened: it is damaged or holds more than weights"):
        load_file(Path("mp_rank_00_model_states.pt"))
    assert not Path("ran").exists()


def test_renamed_checkpoints_alone_are_no_fresh_start(tmp_path):
    rename(write(tmp_path, 5), "best")
    with pytest.raises(ValueError, match=r"every checkpoint is damaged or renamed.*\n.*best is passed over"):
        newest_good(tmp_path)
    (tmp_path / "other/checkpoints/notes").mkdir(parents=True)
    assert newest_good(tmp_path / "other") is None


def test_a_file_that_cannot_be_read_is_damage(tmp_path, monkeypatch):
    write(tmp_path, 5)
    bad = write(tmp_path, 10) / "weights.pt"

    def open_file(path, *args, **kwargs):
        if path == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return whole(path, *args, **kwargs)

    whole = Path.open
    monkeypatch.setattr(Path, "open", open_file)
    folder, _, words = newest_good(tmp_path)
    assert folder.name == "step-00000005"
    assert "Input/output error" in words[0]
