"""A trained run of every layout with its live weights, and the data and exports that belong to it."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import yaml

from data_prep.build import How, build
from data_prep.plan import BuildOptions, Plan
from data_prep.sources import parse_sources
from data_prep.tokenizer import open_tokenizer
from engine.checkpoint.folder import find
from engine.ds_json.read import read_ds_config
from engine.run.folder import claim_run, describe, fill_run
from engine.run.loop import train
from engine.run.outputs import Outputs
from launch.signals import StopSignal
from model.config import ModelConfig
from model.llama import Llama
from storage.manifest import PackingPolicy
from storage.shards import ShardedDataset, open_split
from tests.data_prep.builds import build_here
from tests.engine.programs import Run, zero
from tools import export

STEPS = 4
EVERY = 2  # steps between checkpoints and between validations
RECIPE = {
    "model": {  # odd sizes, so that no parameter can be cut evenly over two ranks
        "vocab_size": 600,
        "hidden_size": 33,
        "intermediate_size": 55,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 10,
        "max_position_embeddings": 128,
    },
    "training": {"global_batch_tokens": 768, "micro_batch_samples": 4, "max_steps": STEPS, "seed": 5},
    "optimizer": {"lr": 1e-2},
    "schedule": {"schedule": "constant", "warmup_steps": 1},
    "validation": {"every_steps": EVERY},
    "checkpoint": {"every_steps": EVERY},
    "logging": {"log_every_steps": 1, "wandb": False},
}
EVEN_HEADS = {"model.hidden_size": "36", "model.num_attention_heads": "4", "model.num_key_value_heads": "2"}
EVEN_WIDTH = EVEN_HEADS | {"model.intermediate_size": "56"}
TIED = {"model.tie_word_embeddings": "true"}
LAYOUTS = {
    "zero0": (zero(0), {}),
    "zero1": (zero(1), TIED),
    "zero2": (zero(2), {}),
    "zero3": (zero(3), TIED),
    "zero0-autocast": (read_ds_config("ds_configs/zero0.json"), TIED),
    "zero1-bf16": (read_ds_config("ds_configs/zero1.json"), {}),
    "zero2-bf16": (read_ds_config("ds_configs/zero2.json"), TIED),
    "zero3-bf16": (read_ds_config("ds_configs/zero3.json"), {}),
    "pipeline": (zero(1, pipeline={"stages": 2}), {}),
    "pipeline-bf16": (read_ds_config("ds_configs/pipeline.json"), TIED),
    "sequence2": (zero(2, sequence_parallel_size=2), EVEN_HEADS),
    "tensor2": (zero(0, tensor_parallel={"autotp_size": 2}), EVEN_WIDTH | {"model.vocab_size": "601"}),
    "tensor2-zero3-bf16": (read_ds_config("ds_configs/tensor2_zero3.json"), EVEN_WIDTH | TIED),
}
MASKED = {
    "masked": (
        zero(1, pipeline={"stages": 2}),
        TIED | {"objective.name": "masked", "objective.mask_ratio": "0.3", "objective.keep_ratio": "0.1"},
    ),
    "diffusion": (
        zero(3),
        {"objective.name": "block_diffusion", "model.attention": "chunked", "model.chunk_size": "16"},
    ),
}
"""Runs that predict masked tokens: in whole documents, and in chunks."""
ADAPTED = {
    "adapters": (
        zero(1, pipeline={"stages": 2}),
        TIED | {"adapters.names": "[plays, topics]", "adapters.r": "4", "adapters.target_modules": "[q_proj, up_proj]"},
    )
}
"""A run that trains an adapter for each source of the data."""


def train_all(folder: str, recipe: str, data: str) -> dict[str, dict[str, np.ndarray]]:
    """What a rank does: train each layout with the loop of train.py; the live float32 weights at the end, by layout."""
    weights, stop = {}, StopSignal()
    for name, (ds_config, overrides) in (LAYOUTS | MASKED | ADAPTED).items():
        run = Run(recipe, data, ds_config, Path(folder) / name, overrides)
        facts = describe(run.plan)
        lock = None
        if run.topology.is_first:
            lock = claim_run(run.folder)
            fill_run(run.folder, facts)
        with Outputs(run.engine, run.plan, run.loop.state, facts, run.folder, lock) as outputs:
            code = train(run.loop, outputs, stop)
            outputs.logger.close(code)
        assert code == 0
        weights[name] = run.weights()
        run.close()
    return weights


class Trained(NamedTuple):
    """The runs of all layouts, `folder / name`, and the weights that their engines ended with."""

    folder: Path
    data: Path
    weights: dict[str, dict[str, np.ndarray]]

    def live(self, name: str) -> Llama:
        """The engine's weights in a plain model."""
        overrides = {key: yaml.safe_load(value) for key, value in (LAYOUTS | MASKED)[name][1].items()}
        changes = {key.removeprefix("model."): value for key, value in overrides.items() if key.startswith("model.")}
        config = ModelConfig(**RECIPE["model"] | {"is_causal": name not in MASKED} | changes)
        model = Llama(config)
        state = {key: torch.from_numpy(value) for key, value in self.weights[name].items()}
        missing, unknown = model.load_state_dict(state, strict=False)
        assert not unknown
        assert missing == (["lm_head.weight"] if config.tie_word_embeddings else [])
        return model.eval()


def export_to(run: Path, output: Path, dtype: str) -> Path:
    """`tools.export` of the newest checkpoint."""
    export.export(run, *find(run), output, getattr(torch, dtype), 5 * 10**9)
    return output


def write_documents(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def packed(texts: list[str], tokenizer: Path, folder: Path, **policy) -> ShardedDataset:
    """The train split of a data set of these documents, none of which is put into another."""
    documents = write_documents(folder / "documents.jsonl", texts)
    build_here([documents], tokenizer, folder / "data", validation_fraction=0, **policy)
    return open_split(folder / "data", "train")


def build_data(sources: list[str], tokenizer: Path, output: Path, seq_length: int, validation_fraction: float) -> Path:
    """`data_prep.build --source ...` within this process."""
    options = BuildOptions(packing=PackingPolicy(seq_length=seq_length), validation_fraction=validation_fraction)
    opened = open_tokenizer(tokenizer)
    build(Plan(parse_sources([], sources), options, opened), opened, output, How(encoder="plain"))
    return output
