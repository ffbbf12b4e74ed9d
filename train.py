"""Train a LLaMA on packed long documents: a recipe says what, a DeepSpeed JSON how, --data on which rows.

    deepspeed [--hostfile H] train.py --recipe recipes/llama-125m.yaml --deepspeed_config ds_configs/zero2.json \\
        --data DATA --output RUN [--section.key value ...]

The same command continues RUN from its newest good checkpoint, on any number of ranks. Exit codes: 0 finished;
1 failed (another rank, which is named, or a traceback); 2 bad input or an output folder that refuses (one sentence a
problem): mend it; 75 stopped early and saved (SIGTERM, SIGUSR1, SIGHUP, end of the launcher, training.max_hours): run
it again; 76 a step hung (stacks in RUN/stacks): the same; 130 as 75, by Ctrl-C, of which a second one ends at once.
"""

import argparse
import sys
from pathlib import Path

if (ROOT := str(Path(__file__).resolve().parent)) not in sys.path:  # where PYTHONSAFEPATH or -P has left it out
    sys.path.insert(0, ROOT)

from launch.signals import StopSignal

FLAGS_OF_OTHERS = {
    "--deepspeed": "leave it out, and name the JSON with --deepspeed_config FILE",
    "--output_dir": "did you mean --output?",
}


def new_parser(every_flag: bool) -> argparse.ArgumentParser:
    """`every_flag`: whether the help explains each recipe key, or the sections in a line each."""
    from console.command import CommandParser, no_url
    from engine.layout.mesh import add_mesh_flags
    from training.config import add_recipe_flags, hints_for_flags

    paragraphs = __doc__.split("\n\n")
    parser = CommandParser(description=paragraphs[0], epilog=paragraphs[2], hints=hints_for_flags() | FLAGS_OF_OTHERS)
    parser.add_argument("--recipe", required=True, help="YAML file: model, optimizer, schedule, limits, seed")
    parser.add_argument("--deepspeed_config", required=True, help="DeepSpeed JSON: ZeRO stage, precision, offload")
    parser.add_argument("--data", type=no_url, required=True, help="folder made by data_prep.build")
    parser.add_argument("--output", type=Path, required=True, help="folder of the run: checkpoints, metrics, run.json")
    add_mesh_flags(parser)
    parser.add_argument("--allow_data_change", action="store_true", help="continue a run on another data set")
    parser.add_argument("--resume_step", type=int, help="go back to this step; later checkpoints move to RUN/set_aside")
    parser.add_argument("--allow_overcommit", action="store_true", help="start although memory cannot suffice")
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)  # given by the launcher
    parser.add_argument("--help-all", action="store_true", help="explain every recipe key and exit")
    add_recipe_flags(parser, every_flag)
    return parser


def parse_arguments(words: list[str]) -> argparse.Namespace:
    if "--help-all" in words:
        return new_parser(every_flag=True).parse_args(["--help"])
    return new_parser(every_flag=False).parse_args(words)


def main(arguments: argparse.Namespace, stop: StopSignal) -> int:
    # What takes longest to import comes after the arguments have been understood.
    from launch.topology import read_topology

    topology = read_topology()

    from engine.checkpoint.manifest import steps
    from engine.run.begin import begin_or_continue
    from engine.run.folder import claim_run, describe, fill_run, layout_facts
    from engine.run.loop import train
    from engine.run.memory import check_memory, largest_need
    from engine.run.outputs import Outputs
    from engine.run.plan import make_plan
    from engine.run.resume import check_resumable
    from planner.recompute import start_decided

    overrides = {name: value for name, value in vars(arguments).items() if "." in name or name == "stages"}

    # Whatever can be wrong is found here, before any process group exists.
    run = arguments.output
    plan = make_plan(
        arguments.recipe,
        overrides,
        arguments.deepspeed_config,
        arguments.data,
        topology,
        {axis: getattr(arguments, axis) for axis in ("pipeline", "tensor", "sequence")},
        fresh=not steps(run),
    )
    notices = plan.warnings + check_resumable(run, plan, arguments.allow_data_change, arguments.resume_step)
    memory = check_memory(plan, topology, arguments.allow_overcommit)
    if topology.is_first:
        print(memory, flush=True)

    plan = start_decided(plan, topology)
    lock = claim_run(run) if topology.is_first else None

    # Continue where the newest good checkpoint stopped, or begin.
    loop, checkpoint, damaged = begin_or_continue(plan, run, arguments.resume_step)
    facts = describe(plan)
    if topology.is_first:
        fill_run(run, facts | {"layout": layout_facts(plan), "memory": largest_need(plan)._asdict()})
    with Outputs(loop.engine, plan, loop.state, facts, run, lock) as outputs:
        for notice in [*notices, *damaged]:
            outputs.logger.log_event(loop.state.step, "notice", text=notice)
        if checkpoint:
            folder, manifest = checkpoint
            outputs.logger.log_event(loop.state.step, "resume", checkpoint=folder.name, written_by=str(manifest.layout))
        code = train(loop, outputs, stop)
        outputs.close(code)
    return code


if __name__ == "__main__":
    # Whoever asks to stop is heard from here on, while whatever takes seconds to import still does.
    request = StopSignal()
    given = parse_arguments(sys.argv[1:])

    from launch.rank import run_rank

    run_rank(lambda: main(given, request))
