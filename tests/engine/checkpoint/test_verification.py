"""All ranks prove a checkpoint together: every file is read once, and what one of them finds holds for all."""

import shutil
from pathlib import Path

import pytest

from engine.checkpoint.folder import agree_on_checkpoint
from engine.checkpoint.manifest import digest_of_file, read_manifest
from tests.engine.checkpoint.test_folder import flip, write
from tests.engine.programs import join_process_group


def agree(run: str, resume_step: int | None = None) -> tuple[list[str], str, list[str]]:
    """On one rank: the files that it hashed, the checkpoint (or the error) and what it was told of others."""
    join_process_group()
    hashed = []

    def digest(path: Path) -> str:
        hashed.append(path.parent.name + "/" + path.name)
        return digest_of_file(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.checkpoint.manifest.digest_of_file", digest)
        try:
            found, words = agree_on_checkpoint(Path(run), resume_step)
        except ValueError as error:
            return hashed, str(error), []
    return hashed, found[0].name if found else "none", words


@pytest.fixture
def run(tmp_path):
    for step in (5, 10):
        write(tmp_path, step)
    return tmp_path


FILES = ("optimizer.pt", "weights.pt")


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_file_is_hashed_by_one_rank(run, on_ranks, ranks):
    results = on_ranks(ranks, agree, str(run))
    assert sorted(name for hashed, *_ in results for name in hashed) == [f"step-00000010/{name}" for name in FILES]
    assert max(len(hashed) for hashed, *_ in results) == max(1, 2 // ranks)
    assert {(found, *words) for _, found, words in results} == {("step-00000010",)}


@pytest.mark.parametrize("file", FILES)
def test_what_one_rank_finds_holds_for_all(run, on_ranks, file):
    flip(run / "checkpoints/step-00000010" / file)
    results = on_ranks(2, agree, str(run))
    assert {found for _, found, _ in results} == {"step-00000005"}
    for _, _, (sentence,) in results:
        assert sentence.startswith("damaged checkpoint passed over")
        assert sentence.endswith(f"{file}: its content has changed since it was written (xxh3-128 differs)")
    flip(run / "checkpoints/step-00000005" / file)
    for _, message, _ in on_ranks(2, agree, str(run)):
        assert message.count("content has changed") == 2


def test_a_step_to_go_back_to_is_read_once(run, on_ranks):
    shutil.copytree(run, run / "copy")
    results = on_ranks(2, agree, str(run), 5)
    assert sorted(name for hashed, *_ in results for name in hashed) == [f"step-00000005/{name}" for name in FILES]
    assert {found for _, found, _ in results} == {"step-00000005"}
    flip(run / "copy/checkpoints/step-00000005/weights.pt")
    for _, message, _ in on_ranks(2, agree, str(run / "copy"), 5):
        assert "weights.pt: its content has changed" in message
    assert read_manifest(run / "copy/checkpoints/step-00000010").state.step == 10
