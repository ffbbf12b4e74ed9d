"""What each way of merging a run's adapters costs, in bits per byte on each source of a data set, beside the base, each
adapter by itself and their mixture; and one of them as an ordinary Hugging Face model.

python -m tools.merge RUN --data DATA [--learn-weights adapter] [--method ties --output HF_DIR]

The ways are those of PEFT's `add_weighted_adapter`. With `--learn-weights` the weights of `cat` are learned on every second
document, and the table is measured on the others.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from console.command import CommandParser, DefaultsInHelp, run_command
from console.progress import Progress
from data_prep.tokenizer import open_tokenizer
from model.merge_ways import MERGED, WAYS, Choice, equal_shares
from storage.shards import ShardedDataset, open_split
from tools.evaluation.tables import cost_table
from tools.model_flags import DTYPES, adapter_shares

if TYPE_CHECKING:
    from torch import Tensor

    from engine.checkpoint.manifest import CheckpointManifest
    from tools.evaluation.domains import AdaptedBase

Shares = Mapping[str, "float | Tensor"]


def main() -> None:
    arguments = parsed()
    import torch

    from engine.checkpoint.folder import find
    from tools.evaluation.domains import open_adapted
    from tools.trained import usable

    run = arguments.run
    checkpoint, manifest = find(run, arguments.step)
    dataset = open_data(arguments, run, manifest)
    adapted = open_adapted(checkpoint, manifest, torch.float32, usable(arguments.device))
    shares = shares_of_ways(arguments, adapted)
    learned = learn(arguments, adapted, dataset, shares["cat"]) if arguments.learn_weights else None
    costs = measured(arguments, adapted, dataset, shares, learned)
    caption = (
        "weights were learned on every second document of each source, all is measured on the others" if learned else ""
    )
    title = f"{run.name}/{checkpoint.name} on {arguments.data} {arguments.split} (bits per byte)"
    Console().print(cost_table(costs, title, caption))
    if arguments.output:
        chosen = learned or shares[arguments.method]
        write(arguments, checkpoint, manifest, adapted, chosen, costs)


def parsed() -> argparse.Namespace:
    parser = CommandParser(prog="python -m tools.merge", description=__doc__, formatter_class=DefaultsInHelp)
    parser.add_argument("run", type=Path, help="folder of a run with adapters")
    parser.add_argument(
        "--data", type=Path, required=True, help="folder made by data_prep.build with the run's tokenizer"
    )
    parser.add_argument("--split", default="validation", help="which split of it")
    parser.add_argument("--max-samples", type=int, help="rows read of each source; all by default")
    parser.add_argument("--batch-samples", type=int, default=4, help="rows in one forward pass")
    parser.add_argument("--step", type=int, help="checkpoint of the run; the newest good one by default")
    parser.add_argument("--device", help="where to run; on the GPU by default where there is one")
    how = parser.add_argument_group("merging")
    how.add_argument("--weights", metavar="NAME=W,...", help="of the adapters; those of a mean by default")
    how.add_argument("--learn-weights", choices=("adapter", "layer"), help="learn those of cat, one for each of these")
    how.add_argument("--density", type=float, default=0.5, help="share of the elements that ties, dare and prune keep")
    how.add_argument("--rank", type=int, help="of svd's adapter; the largest of the adapters' by default")
    how.add_argument("--majority-sign", choices=("total", "frequency"), default="total", help="what ties counts")
    how.add_argument("--seed", type=int, default=0, help="of the elements that dare drops")
    written = parser.add_argument_group("what is written")
    written.add_argument("--output", type=Path, help="folder to create")
    written.add_argument("--method", choices=WAYS, help="the way of the model that is written")
    written.add_argument("--peft", action="store_true", help="write a folder of PEFT's for the merged adapter instead")
    written.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="precision of the weights")
    arguments = parser.parse_args()
    output = arguments.output
    if output and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output {output} exists already: give a folder that is new or empty")
    if bool(arguments.method) != bool(arguments.output):
        raise ValueError("--method and --output belong together: which way is written, and where")
    if arguments.peft and not arguments.output:
        raise ValueError("--peft has no effect without --output: add that")
    if arguments.learn_weights and arguments.method not in (None, "cat"):
        raise ValueError(f"--learn-weights learns those of cat, not of {arguments.method}: leave it out, or write cat")
    if not 0 < arguments.density <= 1:
        raise ValueError(f"--density {arguments.density:g}: above 0, at most 1")
    for flag in ("rank", "max_samples", "batch_samples"):
        if (given := getattr(arguments, flag)) is not None and given < 1:
            raise ValueError(f"--{flag} {given}: at least 1".replace("_", "-"))
    return arguments


def open_data(arguments: argparse.Namespace, run: Path, manifest: "CheckpointManifest") -> ShardedDataset:
    """Raises ValueError where it has another tokenizer than the run."""
    dataset = open_split(arguments.data, arguments.split)
    theirs = open_tokenizer(arguments.data / dataset.manifest.tokenizer.file)
    if theirs.identity != open_tokenizer(run / manifest.data["tokenizer"]["file"]).identity:
        raise ValueError(f"{arguments.data} was built with another tokenizer than {run}: build it with that one")
    return dataset


def shares_of_ways(arguments: argparse.Namespace, adapted: "AdaptedBase") -> dict[str, dict[str, float]]:
    """What each adapter counts in each way that these adapters can be merged in."""
    names = adapted.adapters.names
    given = adapter_shares("--weights", arguments.weights, names) if arguments.weights else None
    shares = {way: given or equal_shares(names, way) for way in WAYS}
    if len({adapted.adapters.rank(name) for name in given or names}) > 1:
        shares = {way: of_way for way, of_way in shares.items() if WAYS[way].of != "factors"}
        if arguments.method not in (None, *shares):
            raise ValueError(
                f"--method {arguments.method} sums factors, but the ranks differ: choose {', '.join(shares)}"
            )
    return shares


def learn(
    arguments: argparse.Namespace, adapted: "AdaptedBase", dataset: ShardedDataset, start: Mapping[str, float]
) -> "dict[str, Tensor]":
    from tools.evaluation.domains import Sample
    from tools.evaluation.learned_shares import learned_shares

    by_layer, sample = arguments.learn_weights == "layer", Sample(arguments.max_samples, 0)
    return learned_shares(adapted, dataset, sample, start, by_layer, arguments.batch_samples)


def measured(
    arguments: argparse.Namespace,
    adapted: "AdaptedBase",
    dataset: ShardedDataset,
    shares: Mapping[str, Shares],
    learned: "Shares | None",
) -> dict[str, dict[str, float]]:
    """Bits per byte of each source, by what the adapters are made of."""
    from tools.evaluation.domains import Sample, bits_per_byte
    from tools.evaluation.long_context import TOKEN_BYTES

    sample, choice = Sample(arguments.max_samples, 1 if learned else None), choice_of(arguments)
    how = dataset, sample, arguments.batch_samples
    unmerged, costs = adapted.unmerged(), {}
    rows = sum(min(count, arguments.max_samples or count) for count in dataset.rows_per_source.values())
    tokens = rows * dataset.manifest.seq_length
    with Progress("measuring", (len(unmerged) + len(shares) + bool(learned)) * tokens * TOKEN_BYTES) as progress:
        for name, model in unmerged.items():
            costs[name] = bits_per_byte(model, *how)
            progress.advance(tokens * TOKEN_BYTES, tokens)
        for way, of_way in shares.items():
            costs[way] = bits_per_byte(adapted.merged(way, of_way, choice), *how)
            progress.advance(tokens * TOKEN_BYTES, tokens)
        if learned:
            costs[f"cat, {in_words(learned)}"] = bits_per_byte(adapted.merged("cat", learned), *how)
            progress.advance(tokens * TOKEN_BYTES, tokens)
    return costs


def write(
    arguments: argparse.Namespace,
    checkpoint: Path,
    manifest: "CheckpointManifest",
    adapted: "AdaptedBase",
    shares: Shares,
    costs: Mapping[str, Mapping[str, float]],
) -> None:
    """The chosen way as a model, or as an adapter of PEFT's."""
    import torch

    from engine.run.whole_weights import read_base
    from model.merging import combined, merged
    from tools import model_card
    from tools.export import ModelForm, export, export_adapters

    adapters, state = combined(adapted.adapters, adapted.state, arguments.method, shares, choice_of(arguments))
    output, dtype = arguments.output, getattr(torch, arguments.dtype)
    said = model_card.merged_by(arguments.method, in_words(shares), choice_of(arguments), costs)
    where = arguments.run, checkpoint, manifest, output, dtype, 5 * 10**9
    if arguments.peft:
        export_adapters(*where, adapters, state, said)
    else:
        weights = merged(read_base(checkpoint, manifest), adapters, state, {MERGED: 1.0})
        export(*where, ModelForm(weights, said=said))
    print(f"{checkpoint}, adapters merged by {arguments.method}, written to {output}")


def choice_of(arguments: argparse.Namespace) -> Choice:
    return Choice(arguments.density, arguments.rank, arguments.majority_sign, arguments.seed)


def in_words(shares: Shares) -> str:
    """`plays 0.61, manuals 0.47`; where there is one for each block `plays 0.55 to 0.70`."""
    words = []
    for name, share in shares.items():
        values = [share] if isinstance(share, float) else share.flatten().tolist()
        low, high = f"{min(values):.3g}", f"{max(values):.3g}"
        words.append(f"{name} {low}" + f" to {high}" * (low != high))
    return ", ".join(words)


if __name__ == "__main__":
    run_command(main)
