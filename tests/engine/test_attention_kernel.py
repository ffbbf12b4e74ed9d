"""Which kernel a CPU attends with: said by the recipe, or measured once and kept; in every layout it computes the same."""

import json
from unittest import mock

import numpy as np
import pytest

from engine import attention_kernel
from engine.attention_kernel import attends_by_products
from model import attention, causal_products
from tests.engine.programs import histories, prepare, zero
from training.config import load_recipe

BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
LAYOUTS = {
    "zero2": zero(2, **BF16),
    "zero3": zero(3, **BF16),
    "autocast": zero(1, torch_autocast={"enabled": True, "dtype": "bfloat16"}),
    "pipeline": zero(1, pipeline={"stages": 2}, **BF16),
    "sequence": zero(1, sequence_parallel_size=2, **BF16),
    "tensor": zero(1, tensor_parallel={"autotp_size": 2}, **BF16),
}


@pytest.fixture
def kept(tmp_path):
    """The file that measurements are kept in; one finds that products are twice as fast."""
    attention_kernel._kept.cache_clear()
    with (
        mock.patch("platformdirs.user_cache_path", return_value=tmp_path / "cache"),
        mock.patch.object(attention_kernel, "_measured", return_value=2.0) as measured,
    ):
        yield tmp_path / "cache" / "attention-kernels.json", measured
    attention_kernel._kept.cache_clear()


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("recipes/llama-125m.yaml", {})


def test_what_is_faster_is_measured_once_and_kept(kept, recipe):
    file, measured = kept
    assert attends_by_products(recipe, BF16, "cpu")
    attention_kernel._kept.cache_clear()  # another process
    measured.return_value = 0.5
    assert attends_by_products(recipe, BF16, "cpu")
    assert measured.call_count == 1
    ((name, speed),) = json.loads(file.read_text()).items()
    assert speed == 2.0
    assert "torch" in name


@pytest.mark.parametrize("content", ["", "[1]", '{"a": null}', '{"a": '])
def test_a_damaged_file_is_measured_anew(kept, recipe, content):
    file, measured = kept
    file.parent.mkdir()
    file.write_text(content)
    measured.return_value = 1.05  # not worth it
    assert not attends_by_products(recipe, BF16, "cpu")
    assert list(json.loads(file.read_text()).values()) == [1.05]


def test_a_folder_that_cannot_be_written_is_no_obstacle(kept, recipe):
    file, measured = kept
    file.parent.write_text("a file in the place of the folder")
    assert attends_by_products(recipe, BF16, "cpu")
    assert attends_by_products(recipe, BF16, "cpu")
    assert measured.call_count == 1


def test_nothing_is_measured_where_the_choice_is_not_open(kept, recipe):
    _, measured = kept
    said = {
        name: load_recipe("recipes/llama-125m.yaml", {"training.attention_kernel": name})
        for name in ("flash", "products")
    }
    assert not attends_by_products(said["flash"], BF16, "cpu")
    assert attends_by_products(said["products"], BF16, "cpu")
    for each in (recipe, said["products"]):
        assert not attends_by_products(each, {}, "cpu")
        assert not attends_by_products(each, BF16, "cuda")
    assert not measured.called


def test_a_measurement_is_a_ratio_of_two_kernels():
    with mock.patch.object(attention, "attend_products", wraps=attention.attend_products) as products:
        assert attention_kernel._measured(2, 16) > 0
    assert products.call_count == attention_kernel.ROUNDS


def histories_of_short_documents(*arguments) -> tuple[dict, dict]:
    """`histories` by both kernels, however short a document is, and how often products were taken."""
    folder, recipe, data, layouts, steps = arguments
    found = {}
    with mock.patch.object(causal_products, "FEWEST_TOKENS", 1):
        for kernel in ("flash", "products"):
            runs = {name: (config, {"training.attention_kernel": kernel}) for name, config in layouts.items()}
            with mock.patch.object(attention, "attend_products", wraps=attention.attend_products) as products:
                found[kernel] = histories(f"{folder}/{kernel}", recipe, data, runs, steps), products.call_count
    return found


def test_layouts_compute_the_same_with_both_kernels(tmp_path, on_ranks):
    steps = 3
    for found in on_ranks(2, histories_of_short_documents, str(tmp_path), *prepare(tmp_path, blocks=2), LAYOUTS, steps):
        (flash, none), (products, calls) = found["flash"], found["products"]
        assert none == 0
        assert calls >= steps * len(LAYOUTS)
        for name in LAYOUTS:
            for key, tolerance in (("loss", 0.005), ("grad_norm", 0.05)):
                expected, values = ([step[key] for step in result[name]["history"]] for result in (flash, products))
                np.testing.assert_allclose(values, expected, rtol=tolerance)
                assert values != expected
