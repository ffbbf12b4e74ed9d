"""Starts a run with `deepspeed`, and starts it again where that can help.

python -m tools.supervise [--hostfile hosts] [--max-restarts 10] -- train.py --recipe ... --output RUN

The words after -- begin with train.py, or with a launcher of your own: torchrun ..., srun ..., deepspeed --num_gpus 4 ....
"""

import sys
from pathlib import Path

from console.command import CommandParser, run_command


def main() -> None:
    parser = CommandParser(prog="python -m tools.supervise", description=__doc__)
    parser.add_argument("--hostfile", type=Path, help="start on those of these hosts that answer (default: here)")
    parser.add_argument("--max-restarts", type=int, default=10, metavar="N", help="give up after so many (default: 10)")
    parser.add_argument(
        "--grace-seconds", type=float, default=600.0, metavar="S", help="for a save after a signal (default: 600)"
    )
    parser.add_argument("words", nargs="*", metavar="-- train.py ...", help="what to start")
    arguments = parser.parse_args()

    from launch.supervisor import Supervisor

    supervisor = Supervisor(arguments.words, arguments.hostfile, arguments.max_restarts, arguments.grace_seconds)
    if code := supervisor.run():
        sys.exit(code)


if __name__ == "__main__":
    run_command(main)
