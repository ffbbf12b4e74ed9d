"""How an engine comes to hold its part of a model."""

import weakref
from pathlib import Path
from unittest import mock

from model.llama import Layer
from tests.engine.programs import Run, prepare, zero

TENSOR = {"tensor_parallel": {"autotp_size": 2}}
LAYOUTS = {"zero1": zero(1), "zero3": zero(3), "tensor2-zero1": zero(1, **TENSOR), "tensor2-zero3": zero(3, **TENSOR)}


def whole_matrices(folder: str, recipe: str, data: str) -> dict[str, list[int]]:
    """By layout, before each layer is made and at the end: elements of the whole matrices of earlier layers still there."""
    found, make = {}, Layer.build
    for name, config in LAYOUTS.items():
        counts, made = [], []

        def watched(layer: Layer, seed: int, counts=counts, made=made):
            counts.append(sum(p.numel() for ref in made if (p := ref()) is not None))
            module = make(layer, seed)
            made.extend(weakref.ref(p) for p in module.parameters() if p.dim() > 1)
            return module

        with mock.patch.object(Layer, "build", watched):
            run = Run(recipe, data, config, Path(folder) / name)
        found[name] = [*counts, sum(p.numel() for ref in made if (p := ref()) is not None)]
        run.close()
    return found


def test_no_more_than_one_whole_layer_is_there_while_a_model_is_built(tmp_path, on_ranks):
    for found in on_ranks(2, whole_matrices, str(tmp_path / "runs"), *prepare(tmp_path)):
        assert min(found.pop("zero1")[1:]) > 0  # where each rank keeps them
        assert len(found) == 3
        assert not any(count for counts in found.values() for count in counts)
