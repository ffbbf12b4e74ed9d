"""For the tests of the commands: a trained run of every layout with its live weights, and the commands called."""

import itertools
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import xxhash
import yaml

from console.command import run_command
from data_prep.build import build
from data_prep.plan import BuildOptions, Plan
from data_prep.sources import parse_sources
from data_prep.tokenizer import open_tokenizer
from engine.checkpoint.folder import find
from engine.checkpoint.manifest import MANIFEST, read_manifest, seal, steps
from engine.ds_json.read import read_ds_config
from engine.run.folder import claim_run, describe, fill_run
from engine.run.loop import train
from engine.run.outputs import Outputs
from launch.signals import StopSignal
from model.config import ModelConfig
from model.llama import Llama
from storage.manifest import PackingPolicy
from storage.shards import ShardedDataset, open_split
from tests.data_prep.support import build_here
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


def train_all(folder: str, recipe: str, data: str) -> dict[str, dict[str, np.ndarray]]:
    """What a rank does: train each layout with the loop of train.py; the live float32 weights at the end, by layout."""
    weights, stop = {}, StopSignal()
    for name, (ds_config, overrides) in (LAYOUTS | MASKED).items():
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


class Called(NamedTuple):
    code: int
    out: str
    err: str


def call(main: Callable[[], None], capsys, monkeypatch, *arguments) -> Called:
    """A command's main function with its command line, as its `__main__` block runs it."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    capsys.readouterr()
    try:
        run_command(main)
    except SystemExit as end:
        return Called(end.code, *capsys.readouterr())
    raise AssertionError("run_command returned")


def exported(run: Path, output: Path, dtype: str) -> Path:
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
    build(Plan(parse_sources([], sources), options, opened), opened, output, encoder="plain")
    return output


LARGE_MODEL = RECIPE["model"] | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 7,
    "num_attention_heads": 16,
    "head_dim": 64,
}


class LargeRun(NamedTuple):
    """A run whose only checkpoint, of ZeRO-2 on two ranks, has more than 400 MB of weights."""

    folder: Path
    shards: list[Path]
    """The optimizer files, one a rank."""
    starts: dict[str, int]
    """Where each parameter begins in the vector of all weights, which is cut over the ranks."""

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.shards)

    @staticmethod
    def values(start: int, count: int) -> torch.Tensor:
        """Elements of that vector: each says where it stands."""
        return (torch.arange(start, start + count) % 65521).float()


def write_large_run(trained: Trained, run: Path) -> LargeRun:
    """The files of a real run with another checkpoint, written in the form of DeepSpeed's."""
    newest = steps(trained.folder / "zero2")[0]
    shutil.copytree(trained.folder / "zero2/tokenizer", run / "tokenizer")
    folder = run / "checkpoints" / newest.name
    folder.mkdir(parents=True)
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in Llama(ModelConfig(**LARGE_MODEL)).named_parameters()}
    ends = list(itertools.accumulate(shape.numel() for shape in shapes.values()))
    share = -(-ends[-1] // 2)
    torch.save({"param_shapes": [shapes]}, folder / "mp_rank_00_model_states.pt")
    shards = [folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2)]
    for rank, shard in enumerate(shards):
        weights = {"single_partition_of_fp32_groups": [LargeRun.values(rank * share, share)]}
        torch.save({"optimizer_state_dict": weights | {"base_optimizer_state": {"state": {}}}}, shard)
    manifest = read_manifest(newest, full=False)
    manifest.recipe["model"] = LARGE_MODEL
    manifest.files = {
        path.name: (path.stat().st_size, xxhash.xxh3_128(path.read_bytes()).hexdigest()) for path in folder.iterdir()
    }
    (folder / MANIFEST).write_bytes(seal(manifest))
    return LargeRun(run, shards, dict(zip(shapes, [0, *ends], strict=False)))


def reads(pid: int, large: LargeRun) -> bool:
    """Whether the process has begun with the checkpoint's files (it checks their hashes first)."""
    try:
        opened = {link.readlink() for link in Path(f"/proc/{pid}/fd").iterdir()}
    except OSError:
        return False
    return not opened.isdisjoint(large.shards)


def anonymous_bytes(pid: int) -> int:
    """What a process holds for itself; pages of mapped files, which the kernel can drop at any time, do not count."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0
