"""What a move to another layout really reads: the plan's bytes, the files' own places, and no more by the system's count."""

from math import prod
from pathlib import Path

import pytest
import torch

from engine import internals
from engine.checkpoint.deepspeed_files import CheckpointFiles
from engine.checkpoint.folder import newest_good
from engine.checkpoint.foreseen import foreseen_division
from engine.checkpoint.saving import layout_of
from engine.layout.slices import cut_dimensions
from engine.run import resume
from engine.safe_load import load_index
from model.config import ModelConfig
from model.llama import Llama
from tests.engine.kept import kept
from tests.engine.programs import Run, prepare
from tests.engine.test_resume import ON_FOUR, ON_TWO
from training.config import Recipe

WIDER = {"model.hidden_size": "96", "model.intermediate_size": "200", "optimizer.lr": "1e-3"}
MOVES = [
    # ranks before, layout, ranks after, layout
    (2, "zero3", 4, "pipeline2-data2"),
    (2, "tensor2-zero3", 4, "tensor2-data2-zero2"),
    (2, "zero0", 4, "tensor2-data2-zero0"),
    (2, "zero2-offload", 4, "sequence2-data2"),
    (2, "zero1-bf16", 2, "tensor2-zero1-bf16"),
    (2, "pipeline", 2, "zero0"),
    (4, "pipeline2-data2", 2, "tensor2-zero3"),
    (4, "tensor2-data2-zero3", 2, "zero2"),
    (4, "sequence2-data2", 2, "pipeline"),
]
CONFIGS = {2: ON_TWO, 4: ON_FOUR}


def saved(folder: str, recipe: str, data: str, ds_config: dict, overrides: dict | None = None) -> str:
    """A checkpoint after one step."""
    run = Run(recipe, data, ds_config, Path(folder), WIDER | (overrides or {}))
    run.steps(1)
    run.save()
    run.close()
    return folder


def resumed(folder: str, source: str, recipe: str, data: str, ds_config: dict) -> dict:
    """Of one rank that continues another run's checkpoint: bytes that it counted and that the system did, and the plan's."""
    run = Run(recipe, data, ds_config, Path(folder), WIDER)
    opened = []

    class Counted(CheckpointFiles):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            opened.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "CheckpointFiles", Counted)
        run.restore(Path(source))  # the first imports what it needs
        checkpoint = newest_good(Path(source))[:2]
        before = read_by_system()
        resume.restore(run.engine, *checkpoint)
        system = read_by_system() - before
    target = foreseen_division(run.plan.recipe.model, run.plan.recipe.optimizer, layout_of(run.engine))
    division = opened[-1].division
    read = (r.box for kept in target.kept(run.topology.rank) for r in division.reads(*kept))
    elements = sum(box.rows * box.width for box in read)
    run.close()
    return {"counted": opened[-1].bytes_read, "planned": elements * 4 * 3, "system": system}


def read_by_system() -> int:
    """Bytes that this process has asked of files so far."""
    words = Path("/proc/self/io").read_text().split()
    return int(words[words.index("rchar:") + 1])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, on_ranks):
    """By ranks and layout: the folder of a run with one checkpoint; recipe and data."""
    folder = tmp_path_factory.mktemp("reads")
    problem = prepare(folder)

    @kept
    def write(ranks: int, name: str) -> tuple[Path, str, str]:
        return Path(on_ranks(ranks, saved, f"{folder}/{ranks}-{name}", *problem, CONFIGS[ranks][name][0])[0]), *problem

    return write


@pytest.mark.parametrize("move", MOVES, ids=lambda move: " ".join(map(str, move)))
def test_all_ranks_together_read_at_most_one_and_a_half_checkpoints(checkpoint, on_ranks, tmp_path, move):
    before, source, after, target = move
    run, *problem = checkpoint(before, source)
    results = on_ranks(after, resumed, str(tmp_path), str(run), *problem, CONFIGS[after][target][0])
    assert [result["counted"] for result in results] == [result["planned"] for result in results]
    _, manifest, _ = newest_good(run)
    whole = Recipe.model_validate(manifest.recipe).model.num_parameters() * 4 * 3
    assert whole <= sum(result["counted"] for result in results) <= 1.5 * whole
    indices = (
        sum(size for size, _ in manifest.files.values()) - whole
    )  # and weights in half precision, which nobody needs
    assert sum(result["system"] for result in results) <= 1.5 * whole + after * indices


def begun_elsewhere(folder: str, recipe: str, data: str, source: dict, target: dict) -> tuple[list[float], list[float]]:
    """Losses of two runs of two steps, the second continued from what the first saved before them, in another layout."""
    losses = []
    for ds_config in (source, target):
        run = Run(recipe, data, ds_config, Path(f"{folder}/{len(losses)}"), WIDER)
        if losses:
            run.restore(Path(f"{folder}/0"))
        else:
            run.save()
        losses.append([step["loss"] for step in run.steps(2)])
        run.close()
    return losses[0], losses[1]


@pytest.mark.parametrize(("source", "target"), [("zero2", "zero3"), ("zero3", "zero0"), ("zero0", "zero2")])
def test_what_was_saved_before_the_first_update_moves(on_ranks, tmp_path, source, target):
    before, after = ON_TWO[source][0], ON_TWO[target][0]
    results = on_ranks(2, begun_elsewhere, str(tmp_path), *prepare(tmp_path), before, after)
    for first, second in results:
        assert second == pytest.approx(first, rel=1e-5)


@pytest.mark.parametrize(("ranks", "source"), dict.fromkeys(move[:2] for move in MOVES), ids=str)
def test_the_files_divide_as_foreseen(checkpoint, ranks, source):
    divides_as_foreseen(checkpoint(ranks, source)[0])


def test_a_pipeline_divides_as_foreseen_for_muon(on_ranks, tmp_path):
    divides_as_foreseen(Path(on_ranks(2, saved, str(tmp_path), *prepare(tmp_path), *ON_TWO["pipeline-muon"])[0]))


def divides_as_foreseen(run: Path) -> None:
    folder, manifest, _ = newest_good(run)
    recipe = Recipe.model_validate(manifest.recipe)
    foreseen = foreseen_division(recipe.model, recipe.optimizer, manifest.layout)
    with CheckpointFiles(folder, manifest) as files:
        assert files.division.shapes == foreseen.shapes
        for found, expected in zip(files.division.parts, foreseen.parts, strict=True):
            assert found.shapes == expected.shapes
            if manifest.layout.zero_stage:
                assert found.ranks == expected.ranks
            if manifest.layout.zero_stage in (1, 2):  # at stage 3 the order does not change what a rank has
                assert (found.sizes, found.places) == (expected.sizes, expected.places)


@pytest.mark.parametrize(("ranks", "source"), dict.fromkeys(move[:2] for move in MOVES), ids=str)
def test_nothing_is_written_twice(checkpoint, ranks, source):
    """But what tensor-parallel ranks have whole, and the count of updates that each parameter or vector has."""
    folder, manifest, _ = newest_good(checkpoint(ranks, source)[0])
    model = Recipe.model_validate(manifest.recipe).model
    on_all = sum(prod(shape) for name, shape in whole_shapes(model).items() if cut_dimensions(model)[name] is None)
    needed = (model.num_parameters() + on_all * (manifest.layout.tensor - 1)) * 4 * 3
    written = sum(stored_bytes(load_index(folder / name)) for name in manifest.files)
    counts = 4 * len(whole_shapes(model)) * manifest.layout.parts
    padding = 4 * 3 * manifest.layout.world_size * len(whole_shapes(model))
    assert needed <= written <= needed + counts + padding


def continued_from_older(folder: str, recipe: str, data: str, ds_config: dict) -> tuple[list[dict], list[dict]]:
    """The same steps without a stop, and after one with a checkpoint that holds the working weights too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(internals, "leave_out_module_weights", lambda engine: None)
        run = Run(recipe, data, ds_config, Path(folder), WIDER)
    run.steps(2)
    run.save()
    expected = run.steps(2)
    run.close()
    run = Run(recipe, data, ds_config, Path(folder), WIDER)
    run.restore()
    history = run.steps(2)
    run.close()
    return expected, history


@pytest.mark.parametrize("name", ["zero2", "zero1-bf16", "pipeline"])
def test_an_older_checkpoint_continues_to_the_bit(on_ranks, tmp_path, name):
    problem = prepare(tmp_path)
    for expected, history in on_ranks(2, continued_from_older, f"{tmp_path}/run", *problem, ON_TWO[name][0]):
        assert history == expected
    manifest = newest_good(tmp_path / "run")[1]
    model = Recipe.model_validate(manifest.recipe).model
    assert sum(size for size, _ in manifest.files.values()) > model.num_parameters() * (4 * 3 + 2)


def stored_bytes(content) -> int:
    """Of all tensors in the content of a file."""
    if isinstance(content, torch.Tensor):
        return content.numel() * content.element_size()
    values = content.values() if isinstance(content, dict) else content if isinstance(content, list | tuple) else ()
    return sum(map(stored_bytes, values))


def whole_shapes(model: ModelConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in Llama(model).named_parameters()}


@pytest.mark.parametrize("buffer", [64, 1000])
def test_a_small_buffer_reads_the_same(checkpoint, monkeypatch, buffer):
    folder, manifest, _ = newest_good(checkpoint(4, "tensor2-data2-zero3")[0])
    with CheckpointFiles(folder, manifest) as files:
        whole = {name: files.read_whole(name, "exp_avg") for name in files.division.first_parts}
        assert files.bytes_read == sum(tensor.numel() * 4 for tensor in whole.values())
    monkeypatch.setattr("engine.checkpoint.deepspeed_files.BUFFER_BYTES", buffer)
    monkeypatch.setattr("engine.checkpoint.deepspeed_files.OPEN_FILES", 1)
    with CheckpointFiles(folder, manifest) as files:
        for name, tensor in whole.items():
            assert torch.equal(files.read_whole(name, "exp_avg"), tensor)


def test_a_file_that_became_shorter_is_said(checkpoint):
    folder, manifest, _ = newest_good(checkpoint(2, "pipeline")[0])
    with CheckpointFiles(folder, manifest) as files:
        name = next(iter(files.division.first_parts))
        files.read_whole(name)
        path = folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
        content = path.read_bytes()
        path.write_bytes(content[:1000])
        try:
            with pytest.raises(ValueError, match=f"{path.name}: ends before what its index names: restore it"):
                files.read_whole(name)
        finally:
            path.write_bytes(content)
