"""For the tests of the commands: a trained run of every layout with its live weights, and the commands called."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data_prep.command import run_command
from engine.run_folder import describe, fill_run
from model.config import ModelConfig
from model.llama import Llama
from tests.engine.programs import BF16, Run, zero
from train import open_outputs, train

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
TIED = {"model.tie_word_embeddings": "true"}
LAYOUTS = {
    "zero0": (zero(0), {}),
    "zero1": (zero(1), TIED),
    "zero2": (zero(2), {}),
    "zero3": (zero(3), TIED),
    "zero0-autocast": (zero(0, torch_autocast={"enabled": True, "dtype": "bfloat16"}), TIED),
    "zero1-bf16": (zero(1, **BF16), {}),
    "zero2-bf16": (zero(2, **BF16), TIED),
    "zero3-bf16": (zero(3, **BF16), {}),
}


def train_all(folder: str, recipe: str, data: str) -> dict[str, dict[str, np.ndarray]]:
    """What a rank does: train each layout with train.py's own loop; the live float32 weights at the end, by layout."""
    weights = {}
    for name, (ds_config, overrides) in LAYOUTS.items():
        run = Run(recipe, data, ds_config, Path(folder) / name, overrides)
        facts = describe(run.plan, data)
        if run.topology.is_first:
            fill_run(run.folder, facts)
        logger, clock = open_outputs(run.engine, run.plan, run.state, facts, run.folder, run.topology)
        with logger:
            stop = type("Never", (), {"name": None})
            code = train(run.engine, run.plan, run.state, logger, clock, stop, run.topology, run.folder, facts)
            logger.close(code)
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
        overrides = {key.removeprefix("model."): value == "true" for key, value in LAYOUTS[name][1].items()}
        model = Llama(ModelConfig(**RECIPE["model"] | overrides))
        state = {key: torch.from_numpy(value) for key, value in self.weights[name].items()}
        missing, unknown = model.load_state_dict(state, strict=False)
        assert not unknown
        assert missing == (["lm_head.weight"] if overrides else [])
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


def write_documents(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path
