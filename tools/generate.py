"""Continue a text with a trained model, printed as it is made.

python -m tools.generate RUN|HF_DIR --prompt "Enter HAMLET" [--temperature 0.8] [--top-p 0.95]

What a run's checkpoint writes is also kept in RUN/samples.jsonl, where tools.report finds it.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from console.command import CommandParser, DefaultsInHelp, run_command
from data_prep.tokenizer import Tokenizer
from tools.model_flags import add_model_flags
from tools.run_history import SAMPLES_FILE

if TYPE_CHECKING:
    import torch

    from tools.trained import Trained

UNFINISHED = "\ufffd"  # what the first bytes of a character decode to until its last byte is there


def main() -> None:
    parser = CommandParser(prog="python -m tools.generate", description=__doc__, formatter_class=DefaultsInHelp)
    add_model_flags(parser)
    parser.add_argument("--prompt", required=True, help="text to continue; - reads it from standard input")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="stop after this many tokens")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 always takes the most likely token")
    parser.add_argument("--top-k", type=int, help="choose among the k most likely tokens only")
    parser.add_argument("--top-p", type=float, help="choose among the fewest tokens with this share of the probability")
    parser.add_argument("--seed", type=int, help="makes the choices repeatable")
    member_help = (
        "of --adapter mixture: one adapter writes a token, drawn by its weight; equal in distribution, and cheaper"
    )
    parser.add_argument("--one-member", action="store_true", help=member_help)
    steps_help = "masked models: steps in which a chunk is unmasked; one a token by default"
    parser.add_argument("--unmasking-steps", type=int, help=steps_help)
    arguments = parser.parse_args()
    if arguments.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {arguments.max_new_tokens}: at least 1")
    if arguments.unmasking_steps is not None and arguments.unmasking_steps < 1:
        raise ValueError(f"--unmasking-steps {arguments.unmasking_steps}: at least 1")
    if arguments.seed is not None and not 0 <= arguments.seed < 2**63:
        raise ValueError(f"--seed {arguments.seed}: from 0 to 2**63 - 1")

    import torch

    from tools.trained import open_trained

    how = arguments.device, arguments.dtype, arguments.adapter
    trained = open_trained(arguments.source, arguments.step, *how)
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    begin = [] if trained.tokenizer.bos_id is None else [trained.tokenizer.bos_id]
    ids = [*begin, *trained.tokenizer.encode_batch([prompt])[0].tolist()]
    start = torch.tensor(ids or [trained.tokenizer.eos_id], device=trained.device)
    tokens = new_tokens(trained, start, arguments)
    pieces = []
    for piece in stream(trained.tokenizer, ids, tokens):
        print(piece, end="", flush=True)
        pieces.append(piece)
    print()
    if trained.checkpoint:
        keep(Path(arguments.source), trained.checkpoint, "".join(pieces), prompt, arguments)


def keep(run: Path, checkpoint: str, text: str, prompt: str, arguments: argparse.Namespace) -> None:
    """In RUN/samples.jsonl, for the report; a run that cannot be written to is left as it is."""
    choice = {key: getattr(arguments, key) for key in ("temperature", "top_k", "top_p", "seed", "adapter")}
    record = {
        "step": int(checkpoint.removeprefix("step-")),
        "prompt": prompt,
        "text": text.removeprefix(prompt),
    } | choice
    with contextlib.suppress(OSError), (run / SAMPLES_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def new_tokens(trained: "Trained", start: "torch.Tensor", arguments: argparse.Namespace) -> Iterable[int]:
    """The continuation of the ids `start` [T], token by token or chunk by chunk as the model was trained."""
    import torch

    from model.generation import generate
    from model.unmasking import unmask

    generator = None if arguments.seed is None else torch.Generator().manual_seed(arguments.seed)
    choice = arguments.temperature, arguments.top_k, arguments.top_p
    if trained.model.config.is_causal:
        if arguments.unmasking_steps is not None:
            raise ValueError(f"--unmasking-steps is for masked models; {trained.name} predicts the next token")
        length, end = arguments.max_new_tokens, trained.tokenizer.eos_id
        return generate(trained.model, start, length, *choice, end, generator, arguments.one_member)
    if arguments.one_member:
        raise ValueError(f"--one-member is for a mixture of adapters; {trained.name} predicts masked tokens")
    how = arguments.max_new_tokens, trained.mask_id, arguments.unmasking_steps
    return chain.from_iterable(unmask(trained.model, start, *how, *choice, generator))


def stream(tokenizer: Tokenizer, prompt: list[int], tokens: Iterable[int]) -> Iterator[str]:
    """The text of prompt and tokens in pieces, each as soon as its last character is complete.

    Ids that the model has beyond the tokenizer's stand for nothing.
    """
    ids, printed = list(prompt), tokenizer.decode(prompt)
    yield printed
    for token in tokens:
        if token >= tokenizer.vocab_size:
            continue
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith(UNFINISHED):
            yield text[len(printed) :]
            printed = text
    yield tokenizer.decode(ids)[len(printed) :]


if __name__ == "__main__":
    run_command(main)
