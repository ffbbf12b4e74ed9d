"""Whether what a checkpoint's manifest says of recipe, data and progress can be true together.

A digest shows that a manifest is as it was written, not that recipe, data and state belong to one another: parts of two
runs, or an edited number, are found here. What a later version may add to recipe or data is left alone.
"""

import operator
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from model.config import ModelConfig
from storage.manifest import TokenizerInfo
from training.sections import ObjectiveConfig, OptimizerConfig
from training.state import TrainState


class _Source(BaseModel):
    documents: NonNegativeInt
    bytes: NonNegativeInt
    tokens: NonNegativeInt


class _Data(BaseModel):
    model_config = ConfigDict(strict=True)

    path: str
    fingerprint: str
    seq_length: PositiveInt
    tokenizer: TokenizerInfo
    sources: dict[str, _Source]


class _Stage(_Data):
    name: str
    first_step: PositiveInt
    weights: dict[str, float] | None


class _DataOfStages(_Data):
    stages: list[_Stage] | None = None
    """None in a checkpoint that is older than stages are."""


class _Training(BaseModel):
    seed: int
    global_batch_tokens: PositiveInt


class _Recipe(BaseModel):
    """Of the recipe, what is read without comparing it to today's."""

    model: ModelConfig
    optimizer: OptimizerConfig
    training: _Training
    objective: ObjectiveConfig = ObjectiveConfig()


def contradictions(recipe: dict[str, Any], data: dict[str, Any], state: TrainState) -> list[str]:
    """A sentence for each thing that cannot be so; recipe and data as `engine.run.folder.describe` makes them."""
    found: list[str] = []
    read: dict[str, Any] = {}
    for section, kind, content in (("recipe", _Recipe, recipe), ("data", _DataOfStages, data)):
        try:
            read[section] = kind.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            found.append(f"{'.'.join(map(str, (section, *first['loc'])))}: {first['msg']}")
    return found or [*_of_numbers(state), *_of_progress(read["recipe"], read["data"], state)]


def _of_numbers(state: TrainState) -> Iterator[str]:
    numbers = {name: value for name, value in state.model_dump().items() if isinstance(value, int) and name != "seed"}
    if negative := [name for name, value in numbers.items() if value < 0]:
        yield f"{', '.join(negative)} below 0"
    if not state.consecutive_skipped_steps <= state.skipped_steps <= state.step:
        yield f"{state.consecutive_skipped_steps} steps skipped in a row, {state.skipped_steps} in all, of {state.step}"
    if state.consumed_in_stage < 0 or min(state.stage_samples, default=0) < 0:
        yield f"its stages used {state.stage_samples} samples, all together {state.consumed_samples}"
    parts = [(steps, steps * samples, steps * tokens) for steps, samples, tokens in state.batches]
    counted, told = (
        [sum(part) for part in zip(*parts, strict=True)],
        [state.step, state.consumed_samples, state.consumed_tokens],
    )
    if parts and (counted != told if counted[0] == state.step else any(map(operator.gt, counted, told))):
        yield f"its history adds up to {counted} steps, samples and tokens, it says {told}"


def _of_progress(recipe: _Recipe, data: _DataOfStages, state: TrainState) -> Iterator[str]:
    begun = [stage for stage in data.stages or [] if stage.first_step <= max(state.step, 1)]
    stage = begun[-1] if begun else data
    if state.seed != recipe.training.seed:
        yield f"its seed is {state.seed}, the recipe's {recipe.training.seed}"
    if state.data_fingerprint != stage.fingerprint:
        yield f"its last step used other data ({state.data_fingerprint}) than it names ({stage.fingerprint})"
    if data.stages and len(state.stage_samples) != max(len(begun) - 1, 0):
        yield f"step {state.step} has {len(state.stage_samples)} stages behind it, not {len(begun) - 1}"
    if state.batches:
        _, samples, tokens = state.batches[-1]
        if tokens != recipe.training.global_batch_tokens:
            yield f"its last step had {tokens} tokens, the recipe's have {recipe.training.global_batch_tokens}"
        if samples * stage.seq_length != tokens:
            yield f"its last step had {samples} rows of {stage.seq_length} for {tokens} tokens"
