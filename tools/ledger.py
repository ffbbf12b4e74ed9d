"""Says which documents a step of a run had, and when a document was, or will be, trained on.

python -m tools.ledger RUN --step N [--csv]
python -m tools.ledger RUN --document KEY_OR_N [--csv]

Nothing of this is recorded: it follows from the run's stages, the sample order and RUN/decisions.jsonl, so it is exact across
restarts, layouts and rewinds. What comes after the newest checkpoint holds if the recipe stays as it is.
"""

from pathlib import Path

from console.command import CommandParser, run_command


def main() -> None:
    parser = CommandParser(prog="python -m tools.ledger", description=__doc__)
    parser.add_argument("run", type=Path, help="the --output folder of a training run")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--step", type=int, metavar="N", help="the rows and documents of this optimizer step")
    what.add_argument("--document", metavar="KEY_OR_N", help="every step of the document with this number or key")
    parser.add_argument("--csv", action="store_true", help="write comma-separated values to standard output")
    arguments = parser.parse_args()

    from tools.run_ledger import open_ledger, show, uses_of

    ledger = open_ledger(arguments.run)
    if arguments.step is not None:
        uses = ledger.of_step(arguments.step)
    else:
        uses = uses_of(ledger, arguments.document)
    show(ledger, uses, arguments.csv)


if __name__ == "__main__":
    run_command(main)
