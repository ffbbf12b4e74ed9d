"""Masks: which tokens may get one, how many do, and that nothing but the sample decides."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from model.config import ModelConfig
from storage.shards import open_split
from tests.properties import examples
from tests.training.corpus import PAD, build
from training.config import Recipe
from training.data import NO_TARGET, TrainingData, make_batch, train_loader, training_order
from training.objective import Masking
from training.sections import DataConfig, ObjectiveConfig

T, VOCABULARY = 32, 1000
MASK = VOCABULARY  # the tokenizer of these data has no mask token: the model's next id is one
MODEL = ModelConfig(
    vocab_size=VOCABULARY + 1,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    attention="chunked",
    chunk_size=6,
    is_causal=False,
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    directory = tmp_path_factory.mktemp("objective")
    build(directory, {"books": [*range(1, 60), 200, 90]}, seq_length=T, overlap=5, vocab_size=VOCABULARY)
    return open_split(directory, "train")


def plain(dataset):
    """Every row, as next-token prediction has it."""
    rows = np.arange(len(dataset))
    return make_batch(dataset, np.zeros_like(rows), rows), rows


def masking(dataset, purpose="training", seed=0, model=MODEL, **objective) -> Masking:
    return Masking(ObjectiveConfig(**objective), model, dataset.manifest, seed, purpose)


OBJECTIVES = [
    {"name": "masked"},
    {"name": "masked", "mask_ratio": 0.4, "random_ratio": 0.1, "keep_ratio": 0.1},
    {"name": "masked", "mask_ratio": (0.0, 1.0)},
    {"name": "block_diffusion"},
    {"name": "block_diffusion", "mask_ratio": (0.3, 0.8)},
]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_only_tokens_that_follow_in_their_document_are_masked(dataset, objective):
    """Brute force over the pieces: never a first token, context, a boundary or padding."""
    batch, rows = plain(dataset)
    found = masking(dataset, **objective)(batch, rows)
    clean, copies = batch["input_ids"], found["copies"]
    targets, noised = found["targets"][:, :T], found["input_ids"][:, :T]
    eligible = np.zeros(clean.shape, bool)
    for number in rows.tolist():
        row, at = dataset.row("books", number), 0
        for length, context in zip(row.seg_len.tolist(), row.seg_ctx.tolist(), strict=True):
            eligible[number, at + max(context, 1) : at + length] = True
            at += length
    eligible &= ~np.isin(clean.numpy(), [1, 2, PAD])
    masked = targets.numpy() != NO_TARGET
    assert masked.any()
    assert not (masked & ~eligible).any()
    assert (targets[masked] == clean[masked]).all()
    assert (noised[~masked] == clean[~masked]).all()
    if not objective.get("keep_ratio"):
        assert (noised[masked] == MASK).all()
    assert (found["target_weights"][:, :T].numpy()[~masked] == 0).all()
    drawn = ObjectiveConfig(**objective).drawn
    assert found["num_targets"] == (eligible.sum() if drawn else masked.sum())
    if copies == 2:
        assert (found["input_ids"][:, T:] == clean).all()
        assert (found["targets"][:, T:] == NO_TARGET).all()
        assert (found["position_ids"][:, T:] == batch["position_ids"]).all()
    assert (found["position_ids"][:, :T] == batch["position_ids"]).all()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_masks_depend_on_the_sample_and_nothing_else(dataset, objective):
    batch, rows = plain(dataset)
    whole = masking(dataset, **objective)(batch, rows + 100)
    for row in (0, 7, len(rows) - 1):
        alone = {key: batch[key][row : row + 1] for key in ("input_ids", "position_ids", "targets")}
        found = masking(dataset, **objective)(alone, np.array([row + 100]))
        for key in ("input_ids", "targets", "target_weights", "position_ids"):
            assert (found[key][0] == whole[key][row]).all()
    other = [(rows + 101, {}), (rows + 100, {"seed": 1}), (rows + 100, {"purpose": "validation"})]
    for samples, changes in other:
        assert (masking(dataset, **changes, **objective)(batch, samples)["input_ids"] != whole["input_ids"]).any()


@given(st.sampled_from([(1, 8), (2, 4), (4, 1)]), st.integers(0, 2), st.sampled_from([0, 2]))
@examples(6)
def test_ranks_micro_batches_and_workers_do_not_enter(dataset, layout, first_step, workers):
    """The same multiset of masked rows in a step, whoever reads them."""
    order = training_order(dataset, DataConfig(), seed=5)
    data = TrainingData(dataset, order, masking(dataset, name="block_diffusion"))

    def step(world, micro_batch, config):
        seen = []
        for rank in range(world):
            layout = {"micro_batch_samples": micro_batch, "accumulation": 8 // world // micro_batch}
            loader = train_loader(data, config, consumed=8 * first_step, world_size=world, rank=rank, **layout)
            for batch in next(loader):
                seen += [tuple(row) for row in batch["input_ids"].tolist()]
        return sorted(seen)

    config = DataConfig(num_workers=workers if layout[0] == 1 else 0)
    assert step(*layout, config) == step(1, 2, DataConfig())


@pytest.mark.parametrize("ratio", [0.15, 0.5, 1.0])
def test_a_fixed_share_is_masked_and_counted(dataset, ratio):
    batch, rows = plain(dataset)
    eligible = masking(dataset, name="masked", mask_ratio=(1.0, 1.0))(batch, rows)["num_targets"]
    masked = 0
    for round_ in range(20):
        found = masking(dataset, name="masked", mask_ratio=ratio)(batch, rows + 1000 * round_)
        masked += found["num_targets"]
        assert set(found["target_weights"].unique().tolist()) <= {0.0, 1.0}
    assert masked / eligible / 20 == pytest.approx(ratio, abs=0.02)


def test_bert_replaces_some_of_the_masked_tokens(dataset):
    batch, rows = plain(dataset)
    kinds = np.zeros(3)
    for round_ in range(20):
        how = masking(dataset, name="masked", mask_ratio=0.5, random_ratio=0.2, keep_ratio=0.3)
        found = how(batch, rows + 1000 * round_)
        masked = found["targets"] != NO_TARGET
        noised, clean = found["input_ids"][masked], batch["input_ids"][masked]
        kinds += [(noised == MASK).sum(), (noised == clean).sum(), ((noised != MASK) & (noised != clean)).sum()]
        assert not np.isin(noised.numpy(), [1, 2, PAD]).any()
    assert kinds / kinds.sum() == pytest.approx([0.5, 0.3, 0.2], abs=0.02)


@pytest.mark.parametrize(
    ("objective", "spread"), [({"name": "masked", "mask_ratio": (0.0, 1.0)}, 0.1), ({"name": "block_diffusion"}, 0.1)]
)
def test_drawn_shares_are_uniform_and_their_weights_cancel_them(dataset, objective, spread):
    """E[weight of a token] = 1 is what makes the weighted sum over the masked tokens a bound per token."""
    batch, rows = plain(dataset)
    total = eligible = 0
    shares = []
    for round_ in range(40):
        found = masking(dataset, **objective)(batch, rows + 1000 * round_)
        weights = found["target_weights"][:, :T]
        total, eligible = total + float(weights.sum()), eligible + found["num_targets"]
        shares += (1 / weights[weights > 0]).tolist()
    assert total / eligible == pytest.approx(1, abs=spread)
    # a masked token was masked with probability t, so t has the density 2t among them
    assert np.quantile(shares, [0.25, 0.5, 0.75]) == pytest.approx(np.sqrt([0.25, 0.5, 0.75]), abs=0.03)


def test_a_chunk_has_one_share_and_chunks_have_different_ones(dataset):
    batch, rows = plain(dataset)
    found = masking(dataset, name="block_diffusion")(batch, rows)
    weights, positions = found["target_weights"][:, :T].numpy(), batch["position_ids"].numpy()
    distinct = 0
    for row in rows:
        chunk = np.cumsum(positions[row] % MODEL.chunk_size == 0)
        of_chunks = [set(weights[row][chunk == c]) - {0.0} for c in np.unique(chunk)]
        assert all(len(values) <= 1 for values in of_chunks)
        distinct += len(set().union(*of_chunks)) > 1
    assert distinct > len(rows) / 2


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ({"name": "causal", "mask_ratio": 0.15}, "mask_ratio has no meaning"),
        ({"name": "masked", "mask_ratio": 0.0}, "one share in"),
        ({"name": "masked", "mask_ratio": (0.8, 0.3)}, "the smaller one first"),
        ({"name": "masked", "mask_ratio": 1.5}, "one share in"),
        ({"name": "block_diffusion", "mask_ratio": 0.5}, "two numbers"),
        ({"name": "block_diffusion", "random_ratio": 0.1}, "fixed mask_ratio"),
        ({"name": "masked", "random_ratio": 0.6, "keep_ratio": 0.6}, "at most 1"),
        ({"name": "prefix"}, "causal"),
    ],
)
def test_contradictions_are_refused(objective, said):
    with pytest.raises(ValidationError, match=said):
        ObjectiveConfig(**objective)


def test_a_tokenizer_without_a_mask_needs_room_for_one(dataset):
    full = MODEL.model_copy(update={"vocab_size": VOCABULARY})
    with pytest.raises(ValueError, match=f"vocab_size to at least {VOCABULARY + 1}"):
        masking(dataset, model=full, name="masked")
    with_mask = dataset.manifest.tokenizer.model_copy(update={"mask_id": 4})
    manifest = dataset.manifest.model_copy(update={"tokenizer": with_mask})
    assert Masking(ObjectiveConfig(name="masked"), full, manifest, 0, "training").mask_id == 4


def recipe(model=None, **objective):
    shape = {key: getattr(MODEL, key) for key in ("vocab_size", "hidden_size", "intermediate_size")}
    shape |= {"num_hidden_layers": 1, "num_attention_heads": 1} | (model or {})
    return Recipe.model_validate(
        {"model": shape, "training": {"global_batch_tokens": 64, "max_steps": 1}, "objective": objective}
    )


def test_the_objective_decides_what_the_model_sees():
    chunks = {"attention": "chunked", "chunk_size": 6}
    assert recipe(chunks).model.visibility.span == 1
    assert recipe(name="masked").model.visibility.span is None
    assert recipe(chunks, name="masked").model.visibility.span == 6
    assert Recipe.model_validate(recipe(name="masked").model_dump()).model.is_causal is False
    with pytest.raises(ValidationError, match=r"contradicts objective\.name masked"):
        recipe({"is_causal": True}, name="masked")
    with pytest.raises(ValidationError, match="works in chunks"):
        recipe(name="block_diffusion")
    with pytest.raises(ValidationError, match="sliding_window is for causal models"):
        recipe({"sliding_window": 4}, name="masked")
