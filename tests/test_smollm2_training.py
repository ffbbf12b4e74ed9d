"""Continued pretraining of a real checkpoint through ZeRO-2 on two ranks; `make test-checkpoint` runs it.

The same three steps are taken with transformers' model and torch's AdamW in one process, document by document.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_prep.tokenizer import open_tokenizer
from model.hf.weights import from_hf_model, save_hf
from storage.shards import open_split
from tests.data_prep.texts import PROSE
from tests.processes import free_port, run_cli
from tests.smollm2 import load
from tests.tools.trained import build_data, export_to, write_documents
from training.data import make_batch
from training.records import read_records

pytestmark = pytest.mark.checkpoint_file
STEPS, LEARNING_RATE, WEIGHT_DECAY, CLIP = 3, 5e-5, 0.1, 1.0


class Continued(NamedTuple):
    start: Path
    """Hugging Face folder of the checkpoint, its tokenizer beside it."""
    data: Path
    losses: list[float]
    export: Path


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("smollm2")
    theirs, tokenizer = load()
    config, state = from_hf_model(theirs)
    save_hf(config, state.items(), folder)
    tokenizer.save_pretrained(folder)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def continued(start, tmp_path_factory) -> Iterator[Continued]:
    folder = tmp_path_factory.mktemp("continued")
    texts = [text[:size] for text, size in zip(PROSE[2:], (1200, 200, 200, 200), strict=False)]
    documents = write_documents(folder / "documents.jsonl", texts)
    data = build_data([f"topics={documents}"], start, folder / "data", seq_length=256, validation_fraction=0)
    recipe = {
        "model": {"config_json": str(start / "config.json")},
        "training": {"initial_weights": str(start), "global_batch_tokens": 512, "max_steps": STEPS},
        "optimizer": {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY, "max_grad_norm": CLIP},
        "schedule": {"schedule": "constant", "warmup_steps": 0},
        "logging": {"log_every_steps": 1, "wandb": False},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    launch = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), "train.py"]
    inputs = ["--recipe", folder / "recipe.yaml", "--deepspeed_config", "ds_configs/zero2_fp32.json", "--data", data]
    done = run_cli([*launch, *inputs, "--output", folder / "run"], timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [r["loss"] for r in read_records(folder / "run/metrics.jsonl") if "loss" in r]
    export = export_to(folder / "run", folder / "export", "float32")
    yield Continued(start, data, losses, export)
    shutil.rmtree(folder)


def loss_of_rows(model, data: Path) -> torch.Tensor:
    """Mean loss over all targets of the data set, every document (or window of one) computed alone."""
    dataset = open_split(data, "train")
    rows = dataset.rows_per_source["topics"]
    assert rows == 2, "one optimizer step takes two rows"
    batch = make_batch(dataset, np.zeros(rows, int), np.arange(rows))
    total = torch.zeros(())
    for ids, positions, targets in zip(batch["input_ids"], batch["position_ids"], batch["targets"], strict=True):
        starts = (positions == 0).nonzero().flatten().tolist()
        for first, last in zip(starts, [*starts[1:], len(ids)], strict=True):
            logits = model(ids[None, first:last]).logits[0]
            total = total + cross_entropy(logits, targets[first:last], ignore_index=-100, reduction="sum")
    assert len(starts) > 1
    return total / batch["num_targets"]


def test_the_folder_is_the_checkpoint(start):
    theirs, tokenizer = load()
    text = "Once upon a time, in 1599, there lived an old clockmaker. ☃\n\n" * 10
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert open_tokenizer(start).encode_batch([text])[0].tolist() == ids[0].tolist()
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(start)(ids).logits, theirs(ids).logits)


def test_three_steps_are_those_of_transformers_and_torch(continued):
    model = AutoModelForCausalLM.from_pretrained(continued.start)
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups["_proj." in name].append(parameter)
    decayed = [{"params": groups[True], "weight_decay": WEIGHT_DECAY}, {"params": groups[False], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(decayed, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8)
    expected = []
    for _ in range(STEPS):
        loss = loss_of_rows(model, continued.data)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert continued.losses[0] == pytest.approx(expected[0], abs=1e-4)
    assert continued.losses == pytest.approx(expected, abs=1e-3)
    assert expected[0] < 4  # it had been trained
    assert expected[0] > expected[1] > expected[2]
    exported = AutoModelForCausalLM.from_pretrained(continued.export)
    with torch.no_grad():
        final = float(loss_of_rows(exported, continued.data))
        assert final == pytest.approx(float(loss_of_rows(model, continued.data)), abs=1e-3)
    assert final < continued.losses[-1]


def test_the_export_keeps_the_tokenizer_and_its_ids(continued):
    theirs, text = load()[1], "The capital of France is <|im_end|> 42 ☃"
    exported = AutoTokenizer.from_pretrained(continued.export)
    for split in (False, True):
        expected = theirs(text, split_special_tokens=split)["input_ids"]
        assert exported(text, split_special_tokens=split)["input_ids"] == expected
