"""Which folder counts as a checkpoint, which one is taken, and which ones are kept."""

from pathlib import Path

import pytest
import xxhash

from engine.checkpoint import CheckpointManifest, Layout, _retire, find, newest_good, read_manifest, steps
from training.config import CheckpointConfig
from training.state import TrainState


def write(run: Path, step: int) -> Path:
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    contents = {"weights.pt": bytes([step]) * 1000, "optimizer.pt": bytes([step + 1]) * 500}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    manifest = CheckpointManifest(
        layout=Layout(zero_stage=2, world_size=2, wrapper="W", optimizer="O"),
        state=TrainState(data_fingerprint="f", seed=0, step=step, wandb_id="w"),
        recipe={},
        ds_config={},
        environment={},
        data={},
        files={name: (len(content), xxhash.xxh3_128(content).hexdigest()) for name, content in contents.items()},
        created="now",
    )
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    return folder


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


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


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        ({"keep_last": 2}, [60, 50]),
        ({"keep_last": 3, "keep_every_steps": 20}, [60, 50, 40, 20]),
        ({"keep_last": 2, "keep_every_steps": 30}, [60, 50, 30]),
        ({"keep_last": 100}, [60, 50, 40, 30, 20, 10]),
    ],
)
def test_retention(tmp_path, policy, kept):
    for step in range(10, 70, 10):
        write(tmp_path, step)
    _retire(tmp_path / "checkpoints", CheckpointConfig(**policy))
    assert [int(path.name.removeprefix("step-")) for path in steps(tmp_path)] == kept
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_an_interrupted_save_or_deletion_is_no_checkpoint(tmp_path):
    good = write(tmp_path, 5)
    (tmp_path / "checkpoints/.step-00000010.partial").mkdir()
    assert steps(tmp_path) == [good]
