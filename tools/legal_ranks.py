"""On how many ranks a run can be continued: prints the largest number that its recipe and JSON allow, up to a given one.

python -m tools.legal_ranks 12 -- train.py --recipe ... --output RUN
"""

from console.command import CommandParser, run_command


def main() -> None:
    parser = CommandParser(prog="python -m tools.legal_ranks", description=__doc__)
    parser.add_argument("most", type=int, help="ranks that there are")
    parser.add_argument("words", nargs="*", metavar="-- train.py ...", help="the command of the run")
    arguments = parser.parse_args()
    print(largest(arguments.words, arguments.most))


def largest(words: list[str], most: int) -> int:
    """0 where there is none. `words`: those of train.py."""
    import argparse
    from pathlib import Path

    from engine.checkpoint.manifest import steps
    from engine.layout.mesh import add_mesh_flags
    from engine.run.plan import make_plan
    from launch.topology import Topology, choose_accelerator
    from training.config import add_recipe_flags

    choose_accelerator()
    import torch

    parser = argparse.ArgumentParser(allow_abbrev=False)
    for flag in ("--recipe", "--deepspeed_config", "--data", "--output"):
        parser.add_argument(flag, required=True)
    add_mesh_flags(parser)
    add_recipe_flags(parser, explained=False)
    given = vars(parser.parse_known_args(words)[0])
    overrides = {name: value for name, value in given.items() if "." in name or name == "stages"}
    degrees = {axis: given[axis] for axis in ("pipeline", "tensor", "sequence")}
    files = given["recipe"], overrides, given["deepspeed_config"], given["data"]
    fresh = not steps(Path(given["output"]))
    for ranks in range(most, 0, -1):
        try:
            make_plan(*files, Topology(0, 0, ranks, torch.device("cpu")), degrees, fresh)
        except ValueError:
            continue
        return ranks
    return 0


if __name__ == "__main__":
    run_command(main)
