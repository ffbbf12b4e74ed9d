"""A run as a folder that any `transformers` user can load: weights, config, tokenizer, model card.

    python -m tools.export RUN [--step N] --output HF_DIR

Weights are read from the checkpoint of whatever ZeRO stage one parameter at a time and written as sharded safetensors,
so memory is bounded by one shard. The folder appears when it is complete.
"""

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

import numpy as np

from console.command import CommandParser, run_command
from console.progress import Progress, say
from data_prep.tokenizer import open_tokenizer
from model.config import ModelConfig
from storage.atomic import publish, write_atomically
from storage.manifest import TokenizerInfo
from storage.shards import open_split
from tools.model_flags import DTYPES
from training.metrics import METRICS_FILE
from training.records import read_records

if TYPE_CHECKING:
    import torch

    from engine.checkpoint.manifest import CheckpointManifest
    from tools.hf_tokenizer import Written

CARD = Template("""---
library_name: transformers
pipeline_tag: $task
tags: [llama, deepspeed, longform]
---

# $name

A $architecture with $parameters parameters, trained with DeepSpeed for $steps optimizer steps on $tokens tokens.

$usage
$beginning Rows held $seq_length tokens; attention did not cross document boundaries.

## Data

Fingerprint `$fingerprint`

| source | documents | bytes of text | tokens | tokens a row |
|---|---|---|---|---|
$sources

## Validation

$validation

## Run

| | |
|---|---|
| seed | $seed |
| optimizer | $optimizer, peak learning rate $lr, weight decay $weight_decay |
| checkpoint | `$checkpoint`, written $created |
| git commit | $commit |
| versions | $versions |
""")
NEXT_TOKEN = Template("""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("$folder"$trust)
model = AutoModelForCausalLM.from_pretrained("$folder")
```
""")
MASKED = Template("""```python
from transformers import AutoModelForMaskedLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("$folder", trust_remote_code=True)
model = AutoModelForMaskedLM.from_pretrained("$folder", trust_remote_code=True)
text = f"To be, or {tokenizer.mask_token} to be"
inputs = tokenizer(text, return_tensors="pt")
logits = model(**inputs).logits  # at each token those of the token itself, not of the next one
```

It was trained to predict $share, replaced by the mask token (id $mask_id), from $context.
`modeling_longform.py` in this folder is the code that `trust_remote_code` runs; $without_it. To let the model
write a text: `python -m tools.generate $folder --prompt "..."`, a command of the repository that trained it.
""")
BEGINNING = "Every document of the training began with the BOS token, which the tokenizer adds by itself."
NOT_ADDED = "Every document of the training began with the BOS token, which the tokenizer leaves to you (`tokenizer.bos_token`)."
TRUST = ", trust_remote_code=True"
SAMPLE_ROWS = 8
"""Of the training data, by which the tokenizer is checked."""


def main() -> None:
    parser = CommandParser(prog="python -m tools.export", description=__doc__)
    parser.add_argument("run", help="folder of a run (train.py's --output)")
    parser.add_argument("--output", required=True, help="folder to create")
    parser.add_argument("--step", type=int, help="checkpoint to take (default: the newest good one)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="precision of the weights (default: bfloat16)"
    )
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="size of a weights file at most (default: 5.0)")
    arguments = parser.parse_args()
    run, output = Path(arguments.run), Path(arguments.output)
    if not 0 < arguments.max_shard_gb < float("inf"):
        raise ValueError(f"--max-shard-gb {arguments.max_shard_gb:g}: more than 0")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output {output} exists already: give a folder that is new or empty")
    import torch

    from engine.checkpoint.folder import find

    checkpoint, manifest = find(run, arguments.step)
    export(run, checkpoint, manifest, output, getattr(torch, arguments.dtype), int(arguments.max_shard_gb * 1e9))
    print(f"{checkpoint} exported to {output}")


def export(
    run: Path,
    checkpoint: Path,
    manifest: "CheckpointManifest",
    output: Path,
    dtype: "torch.dtype",
    max_shard_bytes: int,
) -> None:
    """Write the Hugging Face folder beside `output` and rename it when it is complete."""
    from engine.checkpoint.deepspeed_files import read_weights
    from model.hf.weights import save_hf
    from tools.hf_tokenizer import write_hf_tokenizer
    from tools.trained import objective_of
    from training.objective import mask_token_id

    config, context = exported_config(manifest)
    info = TokenizerInfo.model_validate(manifest.data["tokenizer"])
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        ids = {f"{kind}_token_id": getattr(info, f"{kind}_id") for kind in ("bos", "eos", "pad")}
        objective, mask_id = None, None
        if not config.is_causal:
            objective, mask_id = objective_of(manifest).resolved(), mask_token_id(info, config)
            ids["mask_token_id"] = mask_id
        with Progress("writing weights", config.num_parameters() * dtype.itemsize) as progress:
            weights = counted(read_weights(checkpoint, manifest), dtype.itemsize, progress)
            save_hf(config, weights, partial, dtype, max_shard_bytes, ids, objective)
        texts = training_texts(manifest, run / info.file)
        written = write_hf_tokenizer(info, run / info.file, partial, context, texts, mask_id, config.vocab_size)
        if written.notice:
            say(written.notice)
        write_atomically(partial / "README.md", card(run, checkpoint, manifest, config, output, written).encode())
        publish(partial, output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def exported_config(manifest: "CheckpointManifest") -> tuple[ModelConfig, int]:
    """The model's config, which promises no longer texts than were trained on, and the tokens of the longest of these.

    Where the positions were made for more than this run's rows, by a scaling or by the weights that it began with, the
    recipe's length stays, and the difference is said.
    """
    config = ModelConfig.model_validate(manifest.recipe["model"])
    stages = manifest.data.get("stages", [manifest.data])
    reached = [stage for stage in stages if stage.get("first_step", 1) <= manifest.state.step] or stages[:1]
    rows, promised = max(stage["seq_length"] for stage in reached), config.max_position_embeddings
    if rows == promised or config.position_embedding != "rope":
        return config, promised
    if config.rope_scaling is not None or manifest.recipe["training"].get("initial_weights"):
        say(f"max_position_embeddings is the recipe's {promised:,}; the rows of this training held {rows:,} tokens")
        return config, promised
    say(f"max_position_embeddings is {rows:,}, the tokens of a row in training, not the recipe's {promised:,}")
    return config.model_copy(update={"max_position_embeddings": rows}), rows


def training_texts(manifest: "CheckpointManifest", tokenizer: Path) -> list[str]:
    """The text of some rows of the training data, if they are still where they were."""
    try:
        dataset, opened = open_split(Path(manifest.data["path"]), "train"), open_tokenizer(tokenizer)
        return [
            opened.decode(np.asarray(dataset.row(source, row).ids))
            for source, part in dataset.manifest.splits["train"].items()
            for row in range(min(part.rows, SAMPLE_ROWS))
        ]
    except (ValueError, OSError):
        return []


def counted(
    weights: Iterable[tuple[str, "torch.Tensor"]], item_bytes: int, progress: Progress
) -> Iterator[tuple[str, "torch.Tensor"]]:
    """The weights, counted as they pass; `item_bytes` is what a number of them will take."""
    for name, tensor in weights:
        yield name, tensor
        progress.advance(tensor.numel() * item_bytes)


def card(
    run: Path, checkpoint: Path, manifest: "CheckpointManifest", config: ModelConfig, output: Path, tokenizer: "Written"
) -> str:
    """The model card: what the model is, what it saw, how well it predicts, and what made it."""
    data, recipe, state = manifest.data, manifest.recipe, manifest.state
    trained = [stage for stage in data.get("stages", [data]) if stage.get("first_step", 1) <= state.step]
    sets = list({stage["fingerprint"]: stage for stage in trained}.values())
    rows = [
        f"| {name} | {source['documents']:,} | {source['bytes']:,} | {source['tokens']:,} | {part['seq_length']:,} |"
        for part in sets
        for name, source in part["sources"].items()
    ]
    return CARD.substitute(
        name=output.name,
        task="text-generation" if config.is_causal else "fill-mask",
        usage=_usage(manifest, config, output.name, tokenizer),
        architecture=config.to_hf()["architectures"][0],
        parameters=f"{config.num_parameters():,}",
        steps=f"{state.step:,}",
        tokens=f"{state.consumed_tokens:,}",
        beginning=(BEGINNING if tokenizer.adds_bos else NOT_ADDED)
        if data["tokenizer"]["bos_id"] is not None
        else "Documents have no BOS token.",
        seq_length=", then ".join(f"{part['seq_length']:,}" for part in sets),
        fingerprint="`, then `".join(part["fingerprint"] for part in sets),
        sources="\n".join(rows),
        validation=_validation(run, state.step),
        seed=state.seed,
        optimizer={"adamw": "AdamW", "lion": "Lion", "muon": "Muon", "normuon": "NorMuon"}[recipe["optimizer"]["name"]],
        lr=recipe["optimizer"]["lr"],
        weight_decay=recipe["optimizer"]["weight_decay"],
        checkpoint=checkpoint.name,
        created=manifest.created,
        commit=(manifest.environment.get("git") or {}).get("commit", "unknown"),
        versions=", ".join(
            f"{name} {version}" for name, version in manifest.environment["packages"].items() if version
        ),
    )


def _usage(manifest: "CheckpointManifest", config: ModelConfig, folder: str, tokenizer: "Written") -> str:
    from tools.trained import objective_of
    from training.objective import mask_token_id

    if config.is_causal:
        return NEXT_TOKEN.substitute(folder=folder, trust=TRUST if tokenizer.own_code else "")
    objective = objective_of(manifest)
    low, high = objective.ratios
    share = f"a share of the tokens drawn from [{low:g}, {high:g}]" if objective.drawn else f"{high:.0%} of the tokens"
    context = "all other tokens of their document"
    without_it = "`AutoModelForCausalLM` of transformers 5.2 or newer gives the same logits without it"
    if config.chunk_size is not None:
        context = f"their own chunk of {config.chunk_size} tokens and all earlier ones of their document"
        without_it = "nothing in transformers computes the same"
    return MASKED.substitute(
        folder=folder,
        share=share,
        mask_id=mask_token_id(TokenizerInfo.model_validate(manifest.data["tokenizer"]), config),
        context=context,
        without_it=without_it,
    )


def _validation(run: Path, step: int) -> str:
    metrics = run / METRICS_FILE
    records = [
        r for r in (read_records(metrics) if metrics.exists() else []) if "validation" in r and r["step"] <= step
    ]
    if not records:
        return "None was made during the run."
    rows = [
        f"| {name} | {records[-1]['step']} | {s['loss']:.4f} | "
        + (f"{s['bits_per_byte']:.4f} |" if "bits_per_byte" in s else "|")
        for name, s in records[-1]["validation"].items()
    ]
    return "\n".join(["| set | step | loss (nats per token) | bits per byte |", "|---|---|---|---|", *rows])


if __name__ == "__main__":
    run_command(main)
