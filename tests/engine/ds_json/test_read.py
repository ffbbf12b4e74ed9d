"""The DeepSpeed JSON: what is filled, what is refused, all at once and before anything starts."""

import json
import re

import pytest
import torch
from deepspeed.monitor.config import DeepSpeedMonitorConfig
from hypothesis import given
from hypothesis import strategies as st

from engine.ds_json.keys import KNOWN, SECTIONS
from engine.ds_json.read import read_ds_config, resolve_ds_config
from launch.topology import Topology
from tests.engine.programs import shipped
from tests.properties import examples
from training.config import Recipe
from training.sections import MetricsConfig

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SHIPPED = shipped("auto")
RECIPE = Recipe.model_validate(
    {
        "model": {
            "vocab_size": 256,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
        "training": {"global_batch_tokens": 8 * 128, "micro_batch_samples": 2, "max_steps": 10},
        "optimizer": {"lr": 1e-3, "max_grad_norm": 0.5},
    }
)
QUANTIZED, GROUPED = "kernels exist only on GPUs", "zero_hpz_partition_size 8 must be the ranks of a host"
NVME = ["needs the async_io operator", "/local_nvme must be a folder"]
NOT_HERE = {  # shipped JSONs that this test's two ranks, or a machine without libaio and /local_nvme, cannot take
    "zero2_fp16": {"cpu": ["fp16 does not train on a CPU: use bf16, or neither for float32"]},
    "zero3_zeropp": {"cpu": [QUANTIZED, GROUPED], "cuda": [GROUPED]},
    "zero3_nvme": dict.fromkeys(("cpu", "cuda"), NVME),
}


def resolve(config, world_size=2, device=CPU, recipe=RECIPE):
    return resolve_ds_config(config, "ds.json", recipe, 128, Topology(0, 0, world_size, device))


def problems(config, **kwargs) -> list[str]:
    with pytest.raises(ValueError) as caught:
        resolve(config, **kwargs)
    lines = str(caught.value).splitlines()
    assert all(line.startswith("ds.json: ") for line in lines)
    return [line.removeprefix("ds.json: ") for line in lines]


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_shipped_configs_resolve(name, device):
    raw = read_ds_config(f"ds_configs/{name}.json")
    ranks, filled = SHIPPED[name]
    if reasons := NOT_HERE.get(name, {}).get(device.type):
        found = problems(raw, device=device)
        assert len(found) == len(reasons)
        assert all(reason in problem for reason, problem in zip(reasons, found, strict=True))
        return
    if raw != filled:
        assert 'are both "auto": start with --' in problems(raw, device=device)[0]
    config, batch, mesh, _ = resolve(filled, world_size=ranks, device=device)
    assert batch == (8, 2, 4 // mesh.data)
    assert (config["train_batch_size"], config["gradient_clipping"]) == (8, 0.5)
    assert '"auto"' not in json.dumps(config)
    if raw.get("bf16"):
        assert config["data_types"]["grad_accum_dtype"] == "fp32"


def test_every_problem_is_reported_at_once():
    found = problems(
        {
            "train_micro_batch_size_per_gpu": 3,
            "gradient_clipping": 1.0,
            "zero_optimisation": {"stage": 2},
            "zero_optimization": {
                "stage": 2,
                "reduce_bucket_sise": 5,
                "offload_optimizer": {"device": "cpu", "pin_memry": True},
            },
            "data_types": {"grad_acum_dtype": "fp32"},
            "elasticity": {},
            "bf16": {"enable": True},
        }
    )
    text = "\n".join(found)
    for part in (
        "unknown key 'zero_optimisation'; did you mean 'zero_optimization'?",
        "unknown key 'zero_optimization.reduce_bucket_sise'; did you mean 'reduce_bucket_size'?",
        "unknown key 'zero_optimization.offload_optimizer.pin_memry'; did you mean 'pin_memory'?",
        "unknown key 'data_types.grad_acum_dtype'; did you mean 'grad_accum_dtype'?",
        "unknown key 'bf16.enable'; did you mean 'enabled'?",
        "elasticity was removed from DeepSpeed 0.19",
        "gradient_clipping is 1.0 but the recipe's optimizer.max_grad_norm is 0.5",
        "a step of 8 samples (1024 tokens) cannot be cut into micro-batches of 3 on 2 data-parallel ranks",
    ):
        assert part in text
    assert len(found) == 8


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"zero_optimization": {"stage": 4}}, "stage"),
        ({"zero_optimization": {"stage": "two"}}, "zero_optimization.stage"),
        ({"zero_optimization": 2}, "zero_optimization must be an object"),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, "mics_shard_size was removed"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "keep one"),
        ({"fp16": {"loss_scale": "auto"}}, 'fp16.loss_scale is "auto"'),
        ({"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}, "use stage 1"),
        ({"bf16": {"enabled": True}, "gradient_accumulation_steps": 1}, "use stage 1"),
        ({"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}, '"grad_accum_dtype": "fp32"'),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "needs stage 3"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "raise the stage"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "only on GPUs"),
        ({"scheduler": {"type": "WarmupLR"}}, "the schedule belongs to the recipe"),
        ({"optimizer": {"type": "Lamb"}}, "the recipe's optimizer.name is 'adamw'"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1.0}}}, "optimizer.params.lr is 1.0 but the recipe's"),
        ({"optimizer": {"type": "AdamW", "params": {"learning_rate": 1.0}}}, "optimizer.params.learning_rate"),
        ({"train_batch_size": 16}, "train_batch_size is 16 but the recipe's global batch"),
        ({"train_batch_size": "8.5"}, "valid integer"),
        ({"gradient_accumulation_steps": 3}, "cannot be cut"),
        ({"zero_allow_untested_optimizer": ["auto"]}, "zero_allow_untested_optimizer: Input should be a valid boolean"),
        ({"zero_allow_untested_optimizer": "maybe"}, "zero_allow_untested_optimizer"),
        ({"data_types": {"grad_accum_dtype": "float23"}}, "data_types.grad_accum_dtype"),
        ({"checkpoint": {"tag_validation": "fail"}}, "checkpoint.tag_validation"),
        ({"tensor_parallel": {"tp_overlap_comm": True}}, "tensor_parallel.autotp_size: Field required"),
        ({"tensor_parallel": {"autotp_size": 2, "overlap": True}}, "unknown key 'tensor_parallel.overlap'"),
        (
            {"tensor_parallel": {"autotp_size": 2, "preset_model": "llama"}},
            "preset_model: how matrices are cut follows",
        ),
        ({"tensor_parallel": {"autotp_size": 4}}, "does not divide the 2 ranks of this launch"),
        (
            {"tensor_parallel": {"autotp_size": 2}, "pipeline": {"stages": 2}, "zero_optimization": {"stage": 1}},
            "pipeline.stages 2 x tensor_parallel.autotp_size 2 = 4 does not divide the 2 ranks of this launch",
        ),
        ({"tensor_parallel": {"autotp_size": 2, "split_rows": "some"}}, "tensor_parallel.split_rows"),
        (
            {"tensor_parallel": {"autotp_size": 2}, "zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}},
            "zero_hpz_partition_size (ZeRO++) group ranks that hold different parts",
        ),
        ({"pipeline": {"stages": 2}}, "a pipeline with ZeRO stage 0 clips by the gradients of the first stage alone"),
        ({"pipeline": {"stages": 2}, "zero_optimization": {"stage": 2}}, "impossible"),
        (
            {"pipeline": {"stages": 3}, "zero_optimization": {"stage": 1}},
            "pipeline.stages 3 does not divide the 2 ranks",
        ),
        ({"pipeline": {"stages": 0}}, "pipeline.stages: Input should be greater than 0"),
        ({"pipeline": {"stages": 2, "partition": "best"}}, "pipeline.partition"),
        ({"pipeline": {"stage": 2}}, "unknown key 'pipeline.stage'; did you mean 'stages'?"),
        ({"pipeline": {"activation_checkpoint_interval": 1}}, "unknown key 'pipeline.activation_checkpoint_interval'"),
        ({"pipeline": {}, "zero_optimization": {"stage": 1}, "wall_clock_breakdown": True}, "stop a pipeline"),
        ({"pipeline": {}, "flops_profiler": {"enabled": True}}, "stop a pipeline"),
        ({"sequence_parallel_size": "all"}, "sequence_parallel_size"),
        ({"sequence_parallel_exchange": "values"}, "sequence_parallel_exchange: Input should be 'heads' or 'keys'"),
        ({"sequence_parallel_exchang": "keys"}, "did you mean 'sequence_parallel_exchange'"),
        ({"sequence_parallel_size": 4}, "does not divide the 2 ranks of this launch"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 3}}, "or start a multiple of 3 ranks"),
        ({"compile": {"deepcompile": True}}, "not supported"),
        ({"wandb": {"enabled": True}}, "set logging.wandb in the recipe"),
    ],
)
def test_refusals(config, part):
    assert any(part in problem for problem in problems(config))


@pytest.mark.parametrize("monitor", ["wandb", "tensorboard", "csv_monitor", "comet"])
def test_a_monitor_is_refused_with_where_to_say_it_instead(monitor):
    """Each of them that DeepSpeed knows; what is named is a key of the recipe."""
    assert monitor in DeepSpeedMonitorConfig.model_fields
    (problem,) = problems({monitor: {"enabled": True}})
    named = re.findall(r"logging\.(\w+)", problem)
    assert problem.startswith(f"{monitor}: ")
    assert named
    assert set(named) <= MetricsConfig.model_fields.keys()
    resolve({monitor: {"enabled": False}})


def recipe_with(section: str, **changes) -> Recipe:
    return Recipe.model_validate(RECIPE.model_dump() | {section: getattr(RECIPE, section).model_dump() | changes})


def test_what_the_recipe_asks_for_must_suit_the_layout():
    muon, compiled = recipe_with("optimizer", name="muon"), recipe_with("training", compile=True)
    zero3 = {"zero_optimization": {"stage": 3}}
    assert "muon has not been tried with fp16" in problems({"fp16": {"enabled": True}}, device=GPU, recipe=muon)[0]
    resolve(zero3, recipe=muon)
    assert "training.compile is for blocks without collectives" in problems(zero3, recipe=compiled)[0]
    resolve({}, recipe=muon)
    resolve({"zero_optimization": {"stage": 2}}, recipe=compiled)
    resolve({"tensor_parallel": {"autotp_size": 2}}, recipe=compiled)


def test_tensor_parallelism_needs_heads_and_widths_that_divide():
    assert problems({"tensor_parallel": {"autotp_size": 3}}, world_size=3)[0] == (
        "tensor_parallel.autotp_size 3 does not divide the model's 4 attention heads, 4 key/value heads, 128 feed-forward "
        "width: use 2 or 4"
    )
    one_kv_head = RECIPE.model_copy(update={"model": RECIPE.model.model_copy(update={"num_key_value_heads": 1})})
    found = problems({"tensor_parallel": {"autotp_size": 2}}, recipe=one_kv_head)
    assert found[0].endswith("use another layout")


def test_open_batch_numbers_are_solved_for():
    for given_keys, expected in [
        ({}, (8, 2, 2)),
        ({"train_micro_batch_size_per_gpu": 4}, (8, 4, 1)),
        ({"gradient_accumulation_steps": 4}, (8, 1, 4)),
        ({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 4}, (8, 1, 4)),
    ]:
        assert resolve(given_keys)[1] == expected
    assert resolve({}, world_size=1)[1] == (8, 2, 4)
    assert "set training.global_batch_tokens to 768 or 1536" in problems({}, world_size=3)[0]


def test_agreeing_optimizer_block_is_accepted_and_removed():
    params = {"lr": "auto", "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": "auto"}
    config, *_ = resolve({"optimizer": {"type": "AdamW", "params": params}})
    assert "optimizer" not in config


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('{"a": 1, "a": 2}', "'a' is given twice"),
        ('{"a": }', "line 1, column 7"),
        ("[1]", "not list"),
        ('{"gradient_clipping": NaN}', "NaN"),
        ("[" * 100_000, "cannot be read"),
        ("\xff", "not valid JSON"),
    ],
)
def test_unreadable_files(tmp_path, text, part):
    path = tmp_path / "ds.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"ds\.json") as caught:
        read_ds_config(path)
    assert part in str(caught.value)


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-5, 10**12)
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.just("auto")
)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)
sections = {
    name: st.dictionaries(st.sampled_from(sorted(schema.model_fields)) | st.text(max_size=6), anything, max_size=4)
    for name, schema in SECTIONS.items()
}
documents = st.fixed_dictionaries(
    {}, optional={name: anything | sections.get(name, anything) for name in sorted(KNOWN)}
)


@examples(300)
@given(documents)
def test_any_json_resolves_or_is_refused_in_sentences(config):
    """Whatever the file says, the reader ends in a config without "auto" or in a ValueError."""
    before = json.dumps(config)
    try:
        resolved, batch, mesh, _ = resolve(config)
    except ValueError as error:
        refusal = str(error)
    else:
        refusal = None
    if refusal is not None:
        assert refusal.startswith("ds.json: ")
    else:
        assert batch.samples == batch.micro_batch_samples * batch.accumulation * mesh.data
        assert '"auto"' not in json.dumps({k: v for k, v in resolved.items() if k != "data_types"})
    assert json.dumps(config) == before
