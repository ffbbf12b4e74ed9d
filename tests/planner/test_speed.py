"""The time of a step: what is counted of each layout, and how it depends on rates and sizes."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.run.plan import make_plan
from launch.topology import Topology
from planner.hardware import find_hardware
from planner.lengths import rows_of_steps
from planner.rates import MATRIX_EFFICIENCY, Cost, DerivedLinks, MeasuredLinks, PartRates, Passes, derived_rates, fit
from planner.speed import step_time
from tests.engine.programs import BF16, prepare, zero
from tests.ranks import Ranks

NOTHING = Passes(Cost(), Cost())
RECOMPUTED = {"training.activation_checkpointing": "true"}
SPLIT = {"autotp_size": 2, "split_rows": True}
ON_TWO = {
    "zero0": (zero(0), {}),
    "zero1": (zero(1), {}),
    "zero2": (zero(2), {}),
    "zero3": (zero(3), {}),
    "zero2 in bf16": (zero(2, **BF16), {}),
    "zero3 in bf16": (zero(3, **BF16), {}),
    "tied": (zero(2), {"model.tie_word_embeddings": "true"}),
    "tensor": (zero(0, tensor_parallel={"autotp_size": 2}), {}),
    "tensor, recomputed": (zero(1, tensor_parallel={"autotp_size": 2}), RECOMPUTED),
    "tensor, rows split": (zero(1, tensor_parallel=SPLIT), {}),
    "heads": (zero(1, sequence_parallel_size=2), {}),
    "pipeline": (zero(1, pipeline={"stages": 2}), {"training.micro_batch_samples": "1"}),
}


def plan_of(folder, files, ds_config, overrides, ranks=2):
    (folder / "ds.json").write_text(json.dumps(ds_config))
    topology = Topology(0, 0, ranks, torch.device("cpu"), ranks)
    return make_plan(files[0], overrides, str(folder / "ds.json"), files[1], topology)


def rates_of(plan, **changes):
    """Nothing takes time, and a byte that leaves a rank takes a second."""
    links = DerivedLinks(node=64, inside=(0.0, 1.0), between=(0.0, 1.0))
    free = {"tensor": plan.mesh.tensor, "block": NOTHING, "head": NOTHING, "embedding": NOTHING, "update": 0.0}
    return PartRates(**free | {"copy_byte": 0.0, "links": links, "source": "a test"} | changes)


def test_the_bytes_that_are_counted_leave_the_busiest_rank(tmp_path):
    """Of every layout; between stages of a pipeline each message occupies both, the sender and the receiver."""
    files = prepare(tmp_path)
    with Ranks(2) as ranks:
        counted = ranks.call("tests.planner.sent:sent_bytes", str(tmp_path), *files, ON_TWO, timeout=300)
        tensor = ON_TWO["tensor"][0]
        off = ranks.call("tests.planner.sent:off_whole_blocks", str(tmp_path), *files, ON_TWO, timeout=300)
        texts = ranks.call("tests.planner.sent:calibrated", str(tmp_path), *files, tensor, timeout=300)
        ranks.dismiss(60)
    for name, (ds_config, overrides) in ON_TWO.items():
        plan = plan_of(tmp_path, files, ds_config, overrides)
        planned = step_time(plan, rates_of(plan))
        of_ranks = [of_rank[name] for of_rank in counted]
        left = sum(of_ranks) if plan.mesh.pipeline > 1 else max(of_ranks)
        assert planned.seconds == pytest.approx(left, rel=0.01, abs=2500), name

    for of_rank in off:
        assert set(of_rank) == {"tensor", "tensor, recomputed", "tensor, rows split", "heads"}, (
            "who waits inside of blocks"
        )
        assert max(of_rank.values()) < 1e-5

    assert texts[0] == texts[1], "all ranks have the same rates"
    rates = PartRates.model_validate_json(texts[0])
    assert set(rates.engine) == {0, 1, 2, 3}
    assert max(cost.micro + cost.step for cost in rates.engine.values()) > 0
    assert rates.alone >= 1
    assert rates.coupling is not None
    assert rates.coupling >= 1
    parts = step_time(plan_of(tmp_path, files, tensor, {}), rates).parts
    needed = ("blocks", "head", "embedding", "tensor", "optimizer", "agreement")
    assert {name for name, seconds in parts.items() if seconds > 0} >= set(needed)


POSITIVE = st.floats(1e-6, 1.0)


@settings(max_examples=8)
@given(costs=st.tuples(*[POSITIVE] * 8), factor=st.floats(1.1, 10))
def test_time_is_linear_in_the_rates_and_grows_with_each(plans, costs, factor):
    def rates(plan, call, token, pair, document, head, update, copy_byte, latency, by=1.0):
        block = Passes(Cost(call, token, pair, document), Cost(2 * call, 2 * token, 2 * pair, 2 * document))
        block = Passes(*(Cost(*(by * value for value in cost)) for cost in block))
        links = DerivedLinks(node=64, inside=(by * latency, 1e9 / by), between=(by * latency, 1e9 / by))
        ends = Passes(Cost(token=by * head), Cost(token=by * head))
        of_memory = {"update": by * update, "copy_byte": by * copy_byte}
        return rates_of(plan, block=block, head=ends, embedding=ends, links=links, **of_memory)

    for plan, rows in plans.values():
        once = step_time(plan, rates(plan, *costs), rows)
        assert sum(once.parts.values()) == pytest.approx(once.seconds)
        assert step_time(plan, rates(plan, *costs, by=factor), rows).seconds == pytest.approx(factor * once.seconds)
        for place in range(len(costs)):
            dearer = [value * (factor if number == place else 1) for number, value in enumerate(costs)]
            assert step_time(plan, rates(plan, *dearer), rows).seconds >= once.seconds * (1 - 1e-9)


def test_exchanges_inside_of_blocks_take_as_much_longer_as_was_measured(plans):
    """With the wait for the slowest rank, which is counted for the blocks where it was not."""
    plan, rows = plans["tensor, recomputed"]
    block = Passes(Cost(token=1e-6), Cost(token=2e-6))

    def parts(**changes):
        return step_time(plan, rates_of(plan, block=block, slowest=1.5, **changes), rows).parts

    assumed, once, twice = parts(), parts(coupling=1.0), parts(coupling=2.0)
    assert assumed["blocks"] == pytest.approx(1.5 * once["blocks"])
    assert assumed["tensor"] == once["tensor"] > 0
    assert twice["tensor"] == pytest.approx(2 * once["tensor"])
    assert twice["blocks"] == once["blocks"]
    alone, free = plans["zero2"]
    changed = [step_time(alone, rates_of(alone, block=block, coupling=c), free).seconds for c in (None, 2.0)]
    assert changed[0] == changed[1]


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plans")
    files = prepare(folder)
    made = {name: plan_of(folder, files, *ON_TWO[name]) for name in ("zero2", "tensor, recomputed", "pipeline")}
    return {name: (plan, rows_of_steps(plan, plan.stages[0])) for name, plan in made.items()}


def test_attention_is_that_of_the_documents_and_not_of_the_row(plans):
    """The only cost is that of visible pairs: those of the busiest rank, in every block, forward and backward."""
    plan, rows = plans["zero2"]
    block = Passes(Cost(pair=1.0), Cost(pair=2.0))
    found = step_time(
        plan, rates_of(plan, block=block, links=DerivedLinks(node=64, inside=(0, 1e99), between=(0, 1e99))), rows
    )
    blocks, tokens = plan.recipe.model.num_hidden_layers, plan.stages[0].seq_length
    assert found.seconds == pytest.approx(3 * blocks * rows.pairs.sum(-1).max(-1).mean())
    assert found.parts["attention"] == pytest.approx(found.seconds)
    of_whole_rows = 3 * blocks * plan.batch.accumulation * plan.batch.micro_batch_samples * tokens * (tokens + 1) / 2
    assert found.seconds < 0.9 * of_whole_rows


def test_a_device_of_the_list_reaches_the_share_of_its_peak_that_was_measured(tmp_path):
    """One device, so that nothing is sent: what is left beside the matrix products is little for a model of this width."""
    files = prepare(tmp_path)
    wide = {
        "hidden_size": "4096",
        "intermediate_size": "14336",
        "num_attention_heads": "32",
        "num_key_value_heads": "8",
    }
    overrides = {f"model.{key}": value for key, value in wide.items()} | {"training.global_batch_tokens": "8192"}
    plan = plan_of(tmp_path, files, zero(1, **BF16), overrides | {"training.micro_batch_samples": "128"}, ranks=1)
    hardware = find_hardware("h100x1")
    found = step_time(plan, derived_rates(plan, hardware))
    products = sum(found.parts[name] for name in ("blocks", "attention", "head"))
    mean = rows_of_steps(plan, plan.stages[0]).mean_pairs / 8192
    flops = plan.recipe.model.flops_per_token(2 * mean)
    assert flops * 8192 / products / hardware.device.bf16_flops == pytest.approx(MATRIX_EFFICIENCY[4096], rel=0.02)


def test_links_that_were_not_tried_are_asked_for_by_name():
    links = MeasuredLinks(points={"all_reduce 2": [(10.0, 1.0), (20.0, 2.0), (100.0, 4.0)]})
    found = [links.seconds("all_reduce", 2, 1, size) for size in (1, 10, 15, 60, 180)]
    assert found == pytest.approx([1.0, 1.0, 1.5, 3.0, 6.0])
    with pytest.raises(ValueError, match="the calibration has no all_to_all between 4 ranks"):
        links.seconds("all_to_all", 4, 1, 10)


COEFFICIENT = st.one_of(st.just(0.0), st.floats(1e-3, 1.0))


@given(truth=st.tuples(*[COEFFICIENT] * 4).filter(any))
def test_costs_are_found_again_from_what_they_make(truth):
    shapes = [(1.0, 512.0, 40_000.0, 7.0), (1.0, 512.0, 131_328.0, 1.0), (1.0, 512.0, 16_640.0, 8.0)]
    shapes += [(1.0, 256.0, 32_896.0, 1.0), (1.0, 128.0, 8_256.0, 1.0)]
    scaled = [value / scale for value, scale in zip(truth, (1, 512, 131_328, 8), strict=True)]
    seconds = [sum(a * b for a, b in zip(shape, scaled, strict=True)) for shape in shapes]
    found = fit(shapes, seconds, [4.0, 1.0, 1.0, 1.0, 1.0])
    again = [found.seconds(*shape[1:]) for shape in shapes]
    assert again == pytest.approx(seconds, rel=1e-3)
    assert min(found) >= 0
