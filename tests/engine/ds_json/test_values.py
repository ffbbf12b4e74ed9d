"""JSONs as people have them, and every known key with every JSON type: taken by DeepSpeed too, or refused in sentences."""

import json

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from hypothesis import given
from hypothesis import strategies as st

from engine.ds_json.keys import REFUSED, SECTIONS, TopLevel, _model_of
from engine.ds_json.read import read_ds_config
from tests.engine.ds_json.test_read import GPU, RECIPE, problems, resolve
from tests.properties import examples


def known_places(schema=None, prefix=()) -> list[tuple[str, ...]]:
    if schema is None:
        places = [(key,) for key in (*TopLevel.model_fields, *SECTIONS, *REFUSED, "optimizer")]
        places += [("optimizer", "type"), ("optimizer", "params"), ("optimizer", "params", "lr")]
        return places + [place for name, section in SECTIONS.items() for place in known_places(section, (name,))]
    found = []
    for name, field in schema.model_fields.items():
        for key in {name, field.alias or name}:
            found.append((*prefix, key))
            if (inner := _model_of(schema, key)) is not None and len(prefix) < 3:
                found += known_places(inner, (*prefix, key))
    return found


PLACES = sorted(known_places())
VALUES = [None, True, False, 0, 1, 2, -1, 10**30, 0.5, 1e5, -2.5, 1e308, "", "2", "true", "0.5", "auto", "x", [], [1]]
VALUES += [["a"], {}, {"enabled": True}, {"a": 1}, "cpu", "bf16", "fp32"]


@examples(600)
@given(st.sampled_from(PLACES), st.sampled_from(VALUES), st.sampled_from([0, 1, 2, 3, "2"]), st.sampled_from([1, 2]))
def test_every_key_with_every_type_is_taken_by_both_or_refused_in_sentences(place, value, stage, ranks):
    tree = {"zero_optimization": {"stage": stage}}
    at = tree
    for part in place[:-1]:
        at = at.setdefault(part, {})
    at[place[-1]] = json.loads(json.dumps(value))
    try:
        config = resolve(tree, world_size=ranks).config
    except ValueError:
        return
    assert '"auto"' not in json.dumps(config) or place[-1] == "keep_in_fp32_modules"
    DeepSpeedConfig({key: value for key, value in config.items() if key != "train_batch_size"})


@pytest.mark.parametrize("text", ['{"a": 1e999}', '{"a": 1%s}' % ("0" * 30), '{"a": NaN}', '{"a": %s1' % ("9" * 5000)])
def test_numbers_that_nothing_holds_are_refused(tmp_path, text):
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(ValueError, match=r"ds\.json"):
        read_ds_config(tmp_path / "ds.json")


def test_a_byte_order_mark_is_no_part_of_a_json(tmp_path):
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 1}}', encoding="utf-8-sig")
    assert read_ds_config(tmp_path / "ds.json") == {"zero_optimization": {"stage": 1}}


def test_auto_buckets_are_those_of_transformers_or_larger():
    zero = {"stage": 3} | dict.fromkeys(("reduce_bucket_size", "stage3_prefetch_bucket_size"), "auto")
    for hidden, bucket in ((64, 5_000_000), (4096, 4096 * 4096)):
        recipe = RECIPE.model_copy(update={"model": RECIPE.model.model_copy(update={"hidden_size": hidden})})
        found = resolve({"zero_optimization": zero}, recipe=recipe).config
        assert found["zero_optimization"]["reduce_bucket_size"] == bucket
        assert found["zero_optimization"]["stage3_prefetch_bucket_size"] == int(0.9 * hidden * hidden)


def test_strings_are_judged_as_what_they_say():
    zero = {"stage": "2", "reduce_bucket_size": "5e8"}
    assert problems({"zero_optimization": zero})[0].startswith("zero_optimization.reduce_bucket_size: ")
    config = resolve({"zero_optimization": {"stage": "2", "overlap_comm": "false", "reduce_bucket_size": 5e8}}).config
    assert config["zero_optimization"] == {"stage": 2, "overlap_comm": False, "reduce_bucket_size": 500_000_000}
    assert "neither accumulates" in problems({"zero_optimization": {"stage": "0"}, "bf16": {"enabled": "true"}})[0]
    assert (
        "zero_hpz_partition_size 3" in problems({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": "3"}})[0]
    )
    assert resolve({"steps_per_print": 1e5}).config["steps_per_print"] == 100_000


def test_legacy_offload_is_judged_by_the_rules_of_today():
    assert "offload_optimizer needs stage" in problems({"zero_optimization": {"stage": 0, "cpu_offload": True}})[0]
    assert "offload_param needs stage 3" in problems({"zero_optimization": {"stage": 2, "cpu_offload_param": True}})[0]
    zero = resolve({"zero_optimization": {"stage": 2, "cpu_offload": True}}).config["zero_optimization"]
    assert zero == {"stage": 2, "offload_optimizer": {"device": "cpu"}}


AUTO_BATCH = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}
FP16 = {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2}
FP16 |= {"min_loss_scale": 1}
BF16, BF16_ON = {"enabled": "auto"}, {"enabled": True}
FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
ADAMW = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}}
WARMUP = {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}}
CPU_OFFLOAD = {"device": "cpu", "pin_memory": True}
ZERO2 = {"stage": 2, "allgather_partitions": True, "allgather_bucket_size": 5e8, "overlap_comm": True}
ZERO2 |= {
    "reduce_scatter": True,
    "reduce_bucket_size": 5e8,
    "contiguous_gradients": True,
    "round_robin_gradients": True,
}
ZERO3 = {"stage": 3, "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9}
ZERO3 |= {"reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto", "stage3_max_live_parameters": 1e9}
ZERO3 |= {"stage3_param_persistence_threshold": "auto", "stage3_max_reuse_distance": 1e9}
ZERO3 |= {"stage3_gather_16bit_weights_on_model_save": True}
PRINTS = {"steps_per_print": 1e5, "wall_clock_breakdown": False}
SCHEDULER, CHECKPOINTING = "scheduler: the schedule belongs", "activation_checkpointing: it does nothing by itself"
SUMS, STAGE0 = "gradients would be accumulated", "ZeRO stage 0 with bf16"

PUBLISHED = {
    # what others print or ship, in their keys and values: name: (JSON, the sentences it is refused with)
    "transformers zero2": ({**AUTO_BATCH, **PRINTS, "fp16": FP16, "optimizer": ADAMW, "zero_optimization": ZERO2}, []),
    "transformers zero2 scheduler": ({**AUTO_BATCH, "scheduler": WARMUP, "zero_optimization": ZERO2}, [SCHEDULER]),
    "transformers zero3 bf16": ({**AUTO_BATCH, "bf16": BF16, "zero_optimization": ZERO3}, [SUMS]),
    "transformers zero3 offload": (
        {**AUTO_BATCH, "zero_optimization": ZERO3 | {"offload_optimizer": CPU_OFFLOAD, "offload_param": CPU_OFFLOAD}},
        [],
    ),
    "transformers zero3 nvme": (
        {**AUTO_BATCH, "zero_optimization": ZERO3 | {"offload_param": {"device": "nvme", "nvme_path": "/local_nvme"}}},
        ["offload to nvme", "offload to nvme"],
    ),
    "deepspeed zero tutorial": ({"zero_optimization": {"stage": 1, "reduce_bucket_size": 5e8}, "fp16": FP16}, []),
    "deepspeed zero offload": ({"zero_optimization": ZERO2 | {"cpu_offload": True}}, []),
    "deepspeed bf16": ({"bf16": BF16_ON, "zero_optimization": {"stage": 1}, **FP32_SUMS}, []),
    "deepspeed activation checkpointing": (
        {
            "activation_checkpointing": {"partition_activations": True, "cpu_checkpointing": False},
            "gradient_clipping": 0.5,
        },
        [CHECKPOINTING],
    ),
    "deepspeed flops profiler": (
        {
            "flops_profiler": {
                "enabled": True,
                "profile_step": 1,
                "module_depth": -1,
                "top_modules": 1,
                "detailed": True,
            }
        },
        [],
    ),
    "deepspeed monitors off": (
        {key: {"enabled": False, "team": "t"} for key in ("wandb", "tensorboard", "csv_monitor", "comet")},
        [],
    ),
    "deepspeed monitor on": (
        {"tensorboard": {"enabled": True, "output_path": "out", "job_name": "j"}},
        ["tensorboard: "],
    ),
    "llama-factory z0": (
        {
            **AUTO_BATCH,
            "zero_allow_untested_optimizer": True,
            "fp16": FP16,
            "bf16": BF16,
            "zero_optimization": {"stage": 0},
        },
        [STAGE0],
    ),
    "llama-factory z2": (
        {**AUTO_BATCH, "zero_allow_untested_optimizer": True, "fp16": FP16, "bf16": BF16, "zero_optimization": ZERO2},
        [SUMS],
    ),
    "llama-factory z3 offload": (
        {**AUTO_BATCH, "fp16": FP16, "bf16": BF16, "zero_optimization": ZERO3 | {"offload_optimizer": CPU_OFFLOAD}},
        [SUMS],
    ),
    "axolotl zero1": (
        {**AUTO_BATCH, "bf16": BF16_ON, "fp16": FP16, "zero_optimization": {"stage": 1}, **FP32_SUMS},
        [],
    ),
    "axolotl zero3 bf16": (
        {**AUTO_BATCH, "bf16": BF16_ON, "zero_force_ds_cpu_optimizer": False, "zero_optimization": ZERO3, **FP32_SUMS},
        [],
    ),
    "open-instruct stage3": ({**AUTO_BATCH, **PRINTS, "bf16": BF16, "zero_optimization": ZERO3, **FP32_SUMS}, []),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_jsons_as_people_have_them(name):
    tree, sentences = PUBLISHED[name]
    if sentences:
        found = problems(tree)
        assert len(found) == len(sentences), found
        assert all(part in sentence for part, sentence in zip(sentences, found, strict=True)), found
        return
    resolve(tree)


def test_what_auto_became_and_what_has_no_effect_is_said():
    tree = {"bf16": BF16, "fp16": {"enabled": "auto"}, "zero_optimization": ZERO3, **FP32_SUMS, **PRINTS}
    tree |= {"dump_state": True, "comms_logger": {"enabled": True, "verbose": False}, "dataloader_drop_last": True}
    said = "\n".join(resolve(tree).notices)
    assert 'bf16.enabled "auto" is taken as true here' in said
    assert 'fp16.enabled "auto" is taken as false here' in said
    for key in ("steps_per_print", "dump_state", "comms_logger", "dataloader_drop_last", "stage3_gather_16bit"):
        assert f"{key}" in said
    assert resolve({"fp16": {"enabled": "auto"}}, device=GPU).config["fp16"]["enabled"] is True


def test_keys_that_deepspeed_has_are_not_called_unknown():
    taken = {
        "timers": {"throughput": {"enabled": False}},
        "disable_allgather": True,
        "checkpoint": {"load_universal": False},
    }
    resolve(taken | {"seq_parallel_communication_data_type": "fp32"})
    found = problems({"checkpoint": {"load_universal": True, "writer": {"type": "fast"}}})
    assert len(found) == 2
    assert not any("unknown" in sentence for sentence in found)
