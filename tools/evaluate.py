"""Loss, perplexity and bits per byte of a trained model on a prepared data set, each source by itself, and whether the
model uses the length of its documents: loss by position, gain from context, retrieval of hidden pass keys.

python -m tools.evaluate RUN|HF_DIR --data DATA [--split validation] [--context-gain] [--passkey] [--json FILE]

Of a run the figures are also kept in RUN/evaluations, where tools.report finds them.
"""

import argparse
import functools
import json
import operator
from pathlib import Path
from typing import Any

from rich.console import Console

from data_prep.command import CommandParser, DefaultsInHelp, run_command
from data_prep.tokenizer import open_tokenizer
from tools import evaluation_files
from tools.evaluation_tables import gain_tables, passkey_tables, position_table, score_table
from tools.long_context import context_gain, default_limits, measure, positions
from tools.passkey import PHRASES, Passkeys, default_lengths, passkey
from tools.trained import DTYPES, Trained, default_device, open_trained
from training.manifest import write_atomically
from training.objective import Masking
from training.scores import scores
from training.shards import ShardedDataset, open_split


def main() -> None:
    arguments = parsed()
    trained = open_trained(arguments.source, arguments.step, arguments.device, arguments.dtype)
    dataset = open_split(Path(arguments.data), arguments.split)
    theirs = open_tokenizer(Path(arguments.data) / dataset.manifest.tokenizer.file)
    if trained.tokenizer.identity != theirs.identity:
        raise ValueError(
            f"{arguments.data} was built with another tokenizer than {arguments.source}: build it with that one"
        )
    masking = masks(arguments, trained, dataset)
    analyses = evaluated(arguments, trained, dataset, masking)
    show(f"{trained.name} on {arguments.data} {arguments.split}", analyses, masking)
    about = {
        "model": trained.name,
        "checkpoint": trained.checkpoint,
        "data": str(Path(arguments.data).resolve()),
        "fingerprint": dataset.manifest.fingerprint,
        "split": arguments.split,
        "max_samples": arguments.max_samples,
        "dtype": arguments.dtype,
    }
    if masking:
        about["objective"] = masking.objective.resolved()
    if arguments.json:
        write_atomically(Path(arguments.json), json.dumps(about | analyses, indent=1).encode())
    if trained.checkpoint is not None:
        evaluation_files.store(Path(arguments.source), about, analyses)


def parsed() -> argparse.Namespace:
    parser = CommandParser(prog="python -m tools.evaluate", description=__doc__, formatter_class=DefaultsInHelp)
    parser.add_argument("source", help="folder of a run, or an exported Hugging Face folder")
    parser.add_argument("--data", required=True, help="folder made by data_prep.build with the model's tokenizer")
    parser.add_argument("--split", default="validation", help="which split of it")
    parser.add_argument("--max-samples", type=int, help="rows read of each source; all by default")
    parser.add_argument("--batch-samples", type=int, default=4, help="rows in one forward pass")
    parser.add_argument("--step", type=int, help="checkpoint of a run; the newest good one by default")
    parser.add_argument("--device", default=default_device(), help="where to run")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="precision of the weights")
    parser.add_argument("--json", help="also write the figures to this file")
    gain = parser.add_argument_group("gain from context")
    gain.add_argument("--context-gain", action="store_true", help="compare with what chunks of documents tell alone")
    gain.add_argument(
        "--context-limits", type=int, nargs="+", metavar="N", help="tokens of a chunk; 1/16 to 1/2 of a row by default"
    )
    keys = parser.add_argument_group("pass keys, hidden in text of the data and asked for at its end")
    keys.add_argument("--passkey", action="store_true", help="measure their retrieval by length and depth")
    keys.add_argument(
        "--passkey-lengths", type=int, nargs="+", metavar="N", help="tokens of the texts; 1/4, 1/2, 1 row by default"
    )
    keys.add_argument("--passkey-depths", type=int, default=5, metavar="N", help="places, from the start to the end")
    keys.add_argument("--passkey-trials", type=int, default=10, metavar="N", help="keys for each length and depth")
    keys.add_argument("--passkey-candidates", type=int, default=10, metavar="N", help="keys to choose among")
    keys.add_argument("--passkey-language", choices=("auto", *PHRASES), default="auto", help="auto: as the data")
    keys.add_argument("--seed", type=int, default=0, help="of pass keys and the text around them")
    arguments = parser.parse_args()
    if arguments.json and not Path(arguments.json).absolute().parent.is_dir():
        raise ValueError(f"--json {arguments.json}: there is no such folder")
    if arguments.batch_samples < 1 or (arguments.max_samples is not None and arguments.max_samples < 1):
        raise ValueError("--batch-samples and --max-samples must be at least 1")
    for switch, detail in (("context_gain", "context_limits"), ("passkey", "passkey_lengths")):
        values = getattr(arguments, detail)
        if values and not getattr(arguments, switch):
            raise ValueError(f"--{detail} has no effect without --{switch}: add that".replace("_", "-"))
        if values and min(values) < 1:
            raise ValueError(f"--{detail} {min(values)}: must be at least 1".replace("_", "-"))
    if min(arguments.passkey_depths, arguments.passkey_candidates) < 2 or arguments.passkey_trials < 1:
        raise ValueError("--passkey-depths and --passkey-candidates must be at least 2, --passkey-trials at least 1")
    if arguments.seed < 0:
        raise ValueError(f"--seed {arguments.seed}: must not be negative")
    return arguments


def masks(arguments: argparse.Namespace, trained: Trained, dataset: ShardedDataset) -> Masking | None:
    """The masks of validation during training; None for a model that predicts the next token, as all else here does."""
    if trained.model.config.is_causal:
        return None
    if trained.objective is None:
        raise ValueError(f"{arguments.source}/config.json has no objective, which says how tokens are masked: add it")
    for flag, asked in (("--context-gain", arguments.context_gain), ("--passkey", arguments.passkey)):
        if asked:
            raise ValueError(f"{flag} is for models that predict the next token; {trained.name} predicts masked ones")
    return Masking(trained.objective, trained.model.config, dataset.manifest, seed=0, purpose="validation")


def passkey_lengths(asked: list[int] | None, shortest: int, row_tokens: int, positions: int) -> list[int]:
    """Those asked for, or those of the default ones that have room for a key."""
    lengths = sorted(set(asked or default_lengths(min(row_tokens, positions))))
    if lengths[-1] > positions:
        raise ValueError(f"--passkey-lengths {lengths[-1]}: the model has positions for {positions} tokens")
    if not asked:
        lengths = [length for length in lengths if length >= shortest] or lengths[-1:]
    if lengths[0] < shortest:
        raise ValueError(
            f"a text of {lengths[0]} tokens has no room for a pass key, which takes {shortest} tokens with its question "
            "and a little filler: give longer --passkey-lengths"
        )
    return lengths


def evaluated(
    arguments: argparse.Namespace, trained: Trained, dataset: ShardedDataset, masking: Masking | None
) -> dict[str, Any]:
    """The figures of every analysis that was asked for, JSON-able."""
    model, row_tokens, read = trained.model, dataset.manifest.seq_length, arguments.max_samples
    if arguments.passkey:
        options = arguments.passkey_language, arguments.passkey_candidates, arguments.seed, read
        passkeys = Passkeys(trained.tokenizer, dataset, *options)
        asked, most = arguments.passkey_lengths, model.config.max_position_embeddings
        lengths = passkey_lengths(asked, passkeys.shortest, row_tokens, most)
    limits: list[int] = []
    if arguments.context_gain:
        limits = sorted(set(arguments.context_limits or default_limits(row_tokens)))
    how = arguments.batch_samples, read, limits, masking
    losses = {name: measure(model, dataset, name, *how) for name in dataset.sources}
    sums = {name: (found.full.total, found.full.targets) for name, found in losses.items()}
    summed = {name: scores(dataset, *of_source, [name], masking) for name, of_source in sums.items()}
    if len(losses) > 1:
        losses["all"] = every = functools.reduce(operator.add, losses.values())
        summed["all"] = scores(dataset, every.full.total, every.full.targets, masking=masking)
    analyses: dict[str, Any] = {"scores": summed, "positions": positions(losses)}
    if limits:
        analyses["context_gain"] = context_gain(losses)
    if arguments.passkey:
        analyses["passkey"] = passkey(model, passkeys, lengths, arguments.passkey_depths, arguments.passkey_trials)
    return analyses


def show(title: str, analyses: dict[str, Any], masking: Masking | None) -> None:
    console = Console()
    kind = "loss"
    if masking:
        kind = "bound" if masking.objective.bounds_likelihood else "loss of masked tokens"
    console.print(score_table(analyses["scores"], title, kind), position_table(analyses["positions"], kind))
    if "context_gain" in analyses:
        console.print(*gain_tables(analyses["context_gain"]))
    if "passkey" in analyses:
        console.print(*passkey_tables(analyses["passkey"]))


if __name__ == "__main__":
    run_command(main)
