"""Loss, perplexity and bits per byte of a trained model on a prepared data set, each source by itself.

python -m tools.evaluate RUN|HF_DIR --data DATA [--split validation] [--json FILE]
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from data_prep.command import run_command
from data_prep.progress import Progress
from data_prep.tokenizer import open_tokenizer
from model.llama import Llama
from tools.trained import DTYPES, default_device, open_trained
from training.data import make_batch
from training.manifest import write_atomically
from training.scores import scores
from training.shards import ShardedDataset, open_split

TOKEN_BYTES = 8  # of the int64 ids that the model reads


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.evaluate", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("source", help="folder of a run, or an exported Hugging Face folder")
    parser.add_argument("--data", required=True, help="folder made by data_prep.build with the model's tokenizer")
    parser.add_argument("--split", default="validation", help="which split of it")
    parser.add_argument("--max-samples", type=int, help="rows read of each source; all by default")
    parser.add_argument("--batch-samples", type=int, default=4, help="rows in one forward pass")
    parser.add_argument("--step", type=int, help="checkpoint of a run; the newest good one by default")
    parser.add_argument("--device", default=default_device(), help="where to run")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="precision of the weights")
    parser.add_argument("--json", help="also write the figures to this file")
    arguments = parser.parse_args()
    if arguments.batch_samples < 1 or (arguments.max_samples is not None and arguments.max_samples < 1):
        raise ValueError("--batch-samples and --max-samples must be at least 1")

    trained = open_trained(arguments.source, arguments.step, arguments.device, arguments.dtype)
    dataset = open_split(Path(arguments.data), arguments.split)
    theirs = open_tokenizer(Path(arguments.data) / dataset.manifest.tokenizer.file)
    if trained.tokenizer.identity != theirs.identity:
        raise ValueError(
            f"{arguments.data} was built with another tokenizer than {arguments.source}: build it with that one"
        )
    limit, rows = arguments.max_samples, arguments.batch_samples
    sums = {name: source_sums(trained.model, dataset, name, rows, limit) for name in dataset.sources}
    results = {name: scores(dataset, *pair, [name]) for name, pair in sums.items()}
    if len(sums) > 1:
        results["all"] = scores(dataset, *np.sum(list(sums.values()), axis=0))
    show(trained.name, f"{arguments.data} {arguments.split}", results)
    if arguments.json:
        write_atomically(Path(arguments.json), json.dumps(results, indent=1).encode())


def source_sums(
    model: Llama, dataset: ShardedDataset, source: str, batch_samples: int, max_samples: int | None
) -> tuple[float, int]:
    """Summed cross-entropy in nats, and number of targets, over the rows of one source."""
    count = min(dataset.rows_per_source[source], max_samples or dataset.rows_per_source[source])
    device = model.embed_tokens.weight.device
    loss_sum, targets = 0.0, 0
    row_tokens = dataset.manifest.seq_length
    with Progress(source, count * row_tokens * TOKEN_BYTES) as progress:
        for first in range(0, count, batch_samples):
            numbers = np.arange(first, min(first + batch_samples, count))
            batch = make_batch(dataset, np.full(len(numbers), dataset.sources.index(source)), numbers)
            with torch.inference_mode():
                tensors = (batch[key].to(device) for key in ("input_ids", "position_ids", "targets"))
                loss_sum += float(model(*tensors)[1])
            targets += batch["num_targets"]
            tokens = len(numbers) * row_tokens
            progress.advance(tokens * TOKEN_BYTES, tokens)
    return loss_sum, targets


def show(name: str, data: str, results: dict[str, dict[str, float]]) -> None:
    table = Table("source", "loss", "perplexity", "bits/byte", "targets", title=f"{name} on {data}")
    for source, row in results.items():
        numbers = (
            f"{row['loss']:.4f}",
            f"{row['perplexity']:.2f}",
            f"{row['bits_per_byte']:.4f}",
            f"{row['targets']:,}",
        )
        table.add_row(source, *numbers)
    Console().print(table)


if __name__ == "__main__":
    run_command(main)
