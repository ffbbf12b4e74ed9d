"""A run as a folder that any `transformers` user can load: weights, config, tokenizer, model card.

    python -m tools.export RUN [--step N] [--adapters separate|merged:NAME|mixture] --output HF_DIR

Weights are read from the checkpoint of whatever ZeRO stage one parameter at a time and written as sharded safetensors,
so memory is bounded by one shard. The folder appears when it is complete. Of a run with adapters, `--adapters separate` makes
a folder of PEFT's for each; `merged:NAME`, or `merged:NAME=SHARE,NAME=SHARE`, an ordinary model in which they are added to the
matrices; `mixture` one folder with all of them, and code that mixes their likelihoods.
"""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from console.command import CommandParser, run_command
from console.progress import Progress, say
from data_prep.tokenizer import open_tokenizer
from model.adapter_config import AdaptersConfig
from model.config import ModelConfig
from storage.atomic import finished_folder, write_atomically
from storage.manifest import TokenizerInfo
from storage.shards import open_split
from tools import model_card
from tools.model_flags import DTYPES, adapter_shares

if TYPE_CHECKING:
    import torch

    from engine.checkpoint.manifest import CheckpointManifest
    from tools.hf_tokenizer import Written

SAMPLE_ROWS = 8
"""Of the training data, by which the tokenizer is checked."""


def main() -> None:
    parser = CommandParser(prog="python -m tools.export", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run (train.py's --output)")
    parser.add_argument("--output", type=Path, required=True, help="folder to create")
    parser.add_argument("--step", type=int, help="checkpoint to take (default: the newest good one)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="precision of the weights (default: bfloat16)"
    )
    parser.add_argument(
        "--adapters",
        metavar="HOW",
        help="of a run with adapters: separate, merged:NAME, merged:NAME=SHARE,... or mixture",
    )
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="size of a weights file at most (default: 5.0)")
    arguments = parser.parse_args()
    run, output = arguments.run, arguments.output
    if not 0 < arguments.max_shard_gb < float("inf"):
        raise ValueError(f"--max-shard-gb {arguments.max_shard_gb:g}: more than 0")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output {output} exists already: give a folder that is new or empty")
    import torch

    from engine.checkpoint.folder import find

    checkpoint, manifest = find(run, arguments.step)
    form = form_of(arguments.adapters, checkpoint, manifest)
    dtype, max_shard_bytes = getattr(torch, arguments.dtype), int(arguments.max_shard_gb * 1e9)
    if arguments.adapters == "separate":
        export_adapters(run, checkpoint, manifest, output, dtype, max_shard_bytes)
    else:
        export(run, checkpoint, manifest, output, dtype, max_shard_bytes, form)
    print(f"{checkpoint} exported to {output}")


class ModelForm(NamedTuple):
    """What is made of a run's adapters in a model that is exported."""

    weights: "Iterable[tuple[str, torch.Tensor]]"
    """By names in a `Llama`."""
    adapters: AdaptersConfig = AdaptersConfig()
    """Those that the model keeps."""
    said: str = ""
    """In the model card."""


def form_of(how: str | None, checkpoint: Path, manifest: "CheckpointManifest") -> ModelForm:
    """What `--adapters` asks for. Raises ValueError where it does not fit the run."""
    from engine.run.whole_weights import read_adapters, read_base
    from model.merging import merged
    from tools.trained import adapters_of

    adapters, base = adapters_of(manifest), read_base(checkpoint, manifest)
    if not (names := adapters.names):
        if how is not None:
            raise ValueError(f"--adapters {how}: this run has no adapters: leave it out")
        return ModelForm(base)
    if how == "mixture":
        kept = adapters.model_copy(update={"mode": "mixture"})
        weights = itertools.chain(base, read_adapters(checkpoint, manifest).items())
        return ModelForm(weights, kept, model_card.mixture(kept))
    ways = ", ".join(["separate", f"merged:{names[0]}", *[f"merged:{names[0]}=0.5,{names[1]}=0.5"] * (len(names) > 1)])
    if how == "separate":
        return ModelForm(base)
    if how is None or not how.startswith("merged:"):
        raise ValueError(
            f"this run has the adapters {', '.join(names)}: say with --adapters what to make of them: {ways} or mixture"
        )
    shares = adapter_shares("--adapters", how.removeprefix("merged:"), names)
    return ModelForm(
        merged(base, adapters, read_adapters(checkpoint, manifest), shares), said=model_card.merged(shares)
    )


def export(
    run: Path,
    checkpoint: Path,
    manifest: "CheckpointManifest",
    output: Path,
    dtype: "torch.dtype",
    max_shard_bytes: int,
    form: ModelForm | None = None,
) -> None:
    """Write the Hugging Face folder beside `output` and rename it when it is complete. `form`: of a run with adapters."""
    form = form or form_of(None, checkpoint, manifest)
    with finished_folder(output) as partial:
        config, written = _write_model(run, checkpoint, manifest, partial, dtype, max_shard_bytes, form)
        card = model_card.card(run, checkpoint, manifest, config, output, written, form.said)
        write_atomically(partial / "README.md", card.encode())


def export_adapters(
    run: Path,
    checkpoint: Path,
    manifest: "CheckpointManifest",
    output: Path,
    dtype: "torch.dtype",
    max_shard_bytes: int,
    adapters: AdaptersConfig | None = None,
    state: "dict[str, torch.Tensor] | None" = None,
    said: str = "",
) -> None:
    """Write a folder of PEFT's for each adapter, and one of the base where that is no Hugging Face folder already. Other
    `adapters` than the run's may be given with their parameters, and what the model card says of them."""
    from engine.run.whole_weights import read_adapters, read_base
    from model.hf.peft import save_peft

    config = ModelConfig.model_validate(manifest.recipe["model"])
    train_base = config.adapters.train_base
    config = config.model_copy(update={"adapters": adapters or config.adapters})
    base = manifest.recipe["training"].get("initial_weights")
    with finished_folder(output) as partial:
        if train_base or base is None or not (Path(base) / "config.json").is_file():
            form = ModelForm(read_base(checkpoint, manifest))
            _write_model(run, checkpoint, manifest, partial / "base", dtype, max_shard_bytes, form)
            base = output / "base"
        place = str(Path(base).resolve())
        state = state or read_adapters(checkpoint, manifest)
        for name in config.adapters.names:
            save_peft(config, name, state, partial / name, place, manifest.base, dtype)
        names = "\n".join(f"- `{name}`" for name in config.adapters.names)
        text = model_card.ADAPTERS.substitute(
            name=output.name,
            folder=output.name,
            base=place,
            first=config.adapters.names[0],
            names=names,
            merged=said,
            steps=f"{manifest.state.step:,}",
            validation=model_card.validation_table(run, manifest.state.step),
        )
        write_atomically(partial / "README.md", text.encode())


def _write_model(
    run: Path,
    checkpoint: Path,
    manifest: "CheckpointManifest",
    partial: Path,
    dtype: "torch.dtype",
    max_shard_bytes: int,
    form: ModelForm,
) -> tuple[ModelConfig, "Written"]:
    """The model and its tokenizer in a Hugging Face folder; returns what was written of both."""
    from model.hf.weights import save_hf
    from tools.hf_tokenizer import write_hf_tokenizer
    from tools.trained import objective_of
    from training.objective import mask_token_id

    config, context = exported_config(manifest)
    config = config.model_copy(update={"adapters": form.adapters})
    info = TokenizerInfo.model_validate(manifest.data["tokenizer"])
    ids = {f"{kind}_token_id": getattr(info, f"{kind}_id") for kind in ("bos", "eos", "pad")}
    objective, mask_id = None, None
    if not config.is_causal:
        objective, mask_id = objective_of(manifest).resolved(), mask_token_id(info, config)
        ids["mask_token_id"] = mask_id
    with Progress("writing weights", config.num_parameters() * dtype.itemsize) as progress:
        save_hf(
            config, counted(form.weights, dtype.itemsize, progress), partial, dtype, max_shard_bytes, ids, objective
        )
    texts = training_texts(manifest, run / info.file)
    written = write_hf_tokenizer(info, run / info.file, partial, context, texts, mask_id, config.vocab_size)
    if written.notice:
        say(written.notice)
    return config, written


def exported_config(manifest: "CheckpointManifest") -> tuple[ModelConfig, int]:
    """The model's config without adapters, and the tokens of the longest texts that were trained on, beyond which it promises
    nothing.

    Where the positions were made for more than this run's rows, by a scaling or by the weights that it began with, the
    recipe's length stays, and the difference is said.
    """
    whole = ModelConfig.model_validate(manifest.recipe["model"])
    config = whole.model_copy(update={"adapters": AdaptersConfig()})
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


if __name__ == "__main__":
    run_command(main)
