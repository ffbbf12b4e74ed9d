"""From a recipe to the plan of a run on hardware that is not here, with its data or before they are built."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from engine.run.plan import RunPlan, make_plan
from planner.hardware import Hardware
from planner.stand_in import write_stand_in
from training.config import load_recipe

Degrees = Mapping[str, int | None]
WITHOUT_DATA = {"validation.every_steps": "null", "validation.sets": "{}", "training.initial_weights": "null"}
"""What a recipe names that need not be there yet, and changes nothing that is planned."""


def plan_of_data(
    recipe: str,
    data: str,
    files: Sequence[Path],
    hardware: Hardware,
    degrees: Degrees,
    overrides: Mapping[str, str] = {},
) -> RunPlan:
    """With the first of some DeepSpeed JSONs that is legal; if none is, raises ValueError with what is wrong with all of them, or
    else with that which has least wrong."""
    refusals: list[list[str]] = []
    for file in files:
        for wanted in (degrees, {"pipeline": 2, "tensor": 2, "sequence": 2} | {k: v for k, v in degrees.items() if v}):
            try:
                return make_plan(recipe, dict(overrides), str(file), data, hardware.topology(), wanted)
            except ValueError as error:
                refusals.append(str(error).splitlines())
    least = min(refusals, key=len)
    of_all = [sentence for sentence in least if all(sentence in others for others in refusals)]
    raise ValueError("\n".join(of_all or least))


def plan_without_data(
    recipe: str,
    folder: Path,
    lengths: Sequence[int],
    document_tokens: int | None,
    files: Sequence[Path],
    hardware: Hardware,
    degrees: Degrees,
) -> RunPlan:
    """As if there were data of rows of these `lengths` (one, or one for each stage) and documents of `document_tokens`.

    `folder`: for what takes the place of the data, until the plan has gone.
    """
    given = load_recipe(recipe, {})
    overrides = dict(WITHOUT_DATA)
    if given.adapters.initial_weights:
        overrides["adapters.initial_weights"] = "null"
    if len(lengths) not in (1, len(given.all_stages)):
        raise ValueError(f"--seq_length: give one, or one for each of the {len(given.all_stages)} stages of {recipe}")
    for length in dict.fromkeys(lengths):
        write_stand_in(folder / str(length), given, length, document_tokens)
    if given.stages:
        of_stages = lengths if len(lengths) > 1 else list(lengths) * len(given.stages)
        stages = [
            stage.model_dump(exclude_unset=True) | {"data": str(folder / str(length))}
            for stage, length in zip(given.stages, of_stages, strict=True)
        ]
        overrides["stages"] = yaml.safe_dump(stages, default_flow_style=True, width=2**20)
    return plan_of_data(recipe, str(folder / str(lengths[0])), files, hardware, degrees, overrides)
