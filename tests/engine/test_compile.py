"""`training.compile` changes how blocks run, not what they compute, whatever holds them."""

from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch._dynamo.utils

from engine import build
from tests.engine.programs import histories, prepare, zero

LAYOUTS = {
    "zero2": zero(2),
    "pipeline": zero(1, pipeline={"stages": 2}),
    "sequence": zero(1, sequence_parallel_size=2),
    "keys": zero(1, sequence_parallel_size=2, sequence_parallel_exchange="keys"),
    "tensor": zero(1, tensor_parallel={"autotp_size": 2}),
    "rows": zero(1, tensor_parallel={"autotp_size": 2, "split_rows": True}),
}
COMPILED = {"training.compile": "true"}
RECOMPUTED = COMPILED | {"training.activation_checkpointing": "true"}


def compiled_histories(*arguments) -> tuple[dict, int]:
    """`histories` with a backend that captures graphs and differentiates them like the default one, but needs no C++."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with mock.patch.object(build, "compile_blocks", partial(build.compile_blocks, backend="aot_eager")):
        results = histories(*arguments)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    return results, graphs


def test_compiled_blocks_compute_the_same(tmp_path, on_ranks):
    runs = {name: (config, {}) for name, config in LAYOUTS.items()}
    runs |= {f"{name} compiled": (config, COMPILED) for name, config in LAYOUTS.items()}
    runs["zero2 recomputed"] = LAYOUTS["zero2"], RECOMPUTED
    for results, graphs in on_ranks(2, compiled_histories, str(tmp_path), *prepare(tmp_path, blocks=2), runs, 3):
        compiled = sum("training.compile" in overrides for _, overrides in runs.values())
        assert 0 < graphs < 10 * compiled  # captured, and not again for every new set of documents
        for name in runs:
            expected, found = results[name.split()[0]], results[name]
            for key in ("loss", "grad_norm"):
                values = [[s[key] for s in result["history"]] for result in (expected, found)]
                np.testing.assert_allclose(values[1], values[0], rtol=1e-5)
            for kind, of_layers in expected["layers"][1].layers.items():
                assert found["layers"][1].layers[kind] == pytest.approx(of_layers, rel=1e-5), kind
            for key, value in expected["weights"].items():
                np.testing.assert_allclose(found["weights"][key], value, rtol=1e-5, atol=1e-5)
