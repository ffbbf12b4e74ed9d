"""Loss, perplexity and bits per byte of a trained model on a prepared data set, each source by itself, and whether the
model uses the length of its documents: loss by position, gain from context, retrieval of hidden pass keys.

python -m tools.evaluate RUN|HF_DIR --data DATA [--split validation] [--context-gain] [--passkey] [--json FILE]

Of a run the figures are also kept in RUN/evaluations, where tools.report finds them.
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from console.command import CommandParser, DefaultsInHelp, run_command
from data_prep.tokenizer import open_tokenizer
from storage.atomic import write_atomically
from storage.shards import open_split
from tools.evaluation.files import store_evaluation
from tools.evaluation.passkey_phrases import PHRASES
from tools.evaluation.tables import gain_tables, passkey_tables, position_table, score_table
from tools.model_flags import add_model_flags

if TYPE_CHECKING:
    from training.objective import Masking


def main() -> None:
    arguments = parsed()
    from tools.evaluation.analyses import evaluated, masks
    from tools.trained import open_trained

    how = arguments.device, arguments.dtype, arguments.adapter
    trained = open_trained(arguments.source, arguments.step, *how)
    dataset = open_split(arguments.data, arguments.split)
    theirs = open_tokenizer(arguments.data / dataset.manifest.tokenizer.file)
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
        "data": str(arguments.data.resolve()),
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
        store_evaluation(Path(arguments.source), about, analyses)


def parsed() -> argparse.Namespace:
    parser = CommandParser(prog="python -m tools.evaluate", description=__doc__, formatter_class=DefaultsInHelp)
    add_model_flags(parser)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder made by data_prep.build with the model's tokenizer"
    )
    parser.add_argument("--split", default="validation", help="which split of it")
    parser.add_argument("--max-samples", type=int, help="rows read of each source; all by default")
    parser.add_argument("--batch-samples", type=int, default=4, help="rows in one forward pass")
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


def show(title: str, analyses: dict[str, Any], masking: "Masking | None") -> None:
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
