"""The stages of a run with their data open and their batches cut, checked before anything starts."""

import math
from pathlib import Path
from typing import Any, NamedTuple

from engine.ds_json.read import Resolved, StepDivision
from storage.shards import ShardedDataset
from training.config import Recipe
from training.data import training_order
from training.sections import DataConfig


class Stage(NamedTuple):
    """A stretch of the run with one data set, one row length and one mixture: the steps begin + 1 .. end."""

    name: str
    data: str
    dataset: ShardedDataset
    config: DataConfig
    begin: int
    end: int
    batch: StepDivision

    @property
    def seq_length(self) -> int:
        return self.dataset.manifest.seq_length

    @property
    def mean_document_tokens(self) -> float:
        """Average stretch of one row over which attention runs, for the count of FLOPs."""
        sources = self.dataset.manifest.splits[self.dataset.split].values()
        documents, tokens = sum(s.documents for s in sources), sum(s.tokens for s in sources)
        return min(self.seq_length, tokens / documents)

    def describe(self) -> dict[str, Any]:
        """What determines the stage, JSON-able."""
        place = {"name": self.name, "first_step": self.begin + 1, "last_step": self.end}
        return place | {"weights": self.config.weights, "batch": self.batch._asdict(), **self.describe_data()}

    def describe_data(self) -> dict[str, Any]:
        manifest = self.dataset.manifest
        sources = manifest.splits[self.dataset.split]
        return {
            "path": str(Path(self.data).resolve()),
            "fingerprint": manifest.fingerprint,
            "seq_length": manifest.seq_length,
            "tokenizer": manifest.tokenizer.model_dump(),
            "sources": {name: source.model_dump(exclude={"shards"}) for name, source in sources.items()},
        }


def plan_stages(
    recipe: Recipe, folders: list[str], datasets: list[ShardedDataset], resolved: Resolved | None
) -> tuple[list[Stage], list[str]]:
    """The stages of a recipe over their open data sets, and a sentence for each reason why they cannot be.

    How the first stage's step is cut is `resolved`, since the DeepSpeed JSON may say it (None: it is broken, and nothing is
    cut). A later stage has as many tokens in a step, cut into micro-batches of its own size; by default the largest that
    divide the step and hold at most the tokens of the first stage's.
    """
    stages, problems, begin = [], [], 0
    step_tokens = recipe.training.global_batch_tokens
    lengths = [dataset.manifest.seq_length for dataset in datasets]
    batch = resolved.batch if resolved else StepDivision(0, 0, 0)
    micro_tokens = batch.micro_batch_samples * lengths[0]
    for number, (part, folder, dataset) in enumerate(zip(recipe.all_stages, folders, datasets, strict=True)):
        label = f"stages: {part.name}: " if recipe.stages else ""
        config = recipe.data if part.weights is None else recipe.data.model_copy(update={"weights": part.weights})
        try:
            training_order(dataset, config, recipe.training.seed)
        except ValueError as error:
            problems.append(f"{label}{error}")
        length = lengths[number]
        if number and step_tokens % length:
            unit = math.lcm(*lengths)
            near = sorted({max(unit, step_tokens // unit * unit), (step_tokens // unit + 1) * unit})
            problems.append(
                f"{label}training.global_batch_tokens={step_tokens} is not a multiple of the {length} tokens of a row of "
                f"{folder}: use {' or '.join(map(str, near))}, which suit every stage"
            )
        elif number and resolved:
            rows = step_tokens // length, part.micro_batch_samples, micro_tokens // length
            batch, problem = _divide_step(*rows, resolved.mesh.data)
            problems += [f"{label}{problem}"] * bool(problem)
        end = begin + part.steps(step_tokens)
        assert part.name is not None, "all_stages gives each one"
        stages.append(Stage(part.name, folder, dataset, config, begin, end, batch))
        begin = end
    return stages, problems


def _divide_step(samples: int, micro: int | None, at_most: int, data_ranks: int) -> tuple[StepDivision, str]:
    """A step of so many rows as micro-batches of `micro` rows, else of up to `at_most`; and why it cannot be cut so."""
    share, rest = divmod(samples, data_ranks)
    if rest:
        return StepDivision(samples, 1, 1), (
            f"a step of {samples} rows cannot be shared evenly by {data_ranks} data-parallel ranks: raise "
            "training.global_batch_tokens or use fewer ranks"
        )
    if micro is None:
        micro = next(size for size in range(max(1, min(at_most, share)), 0, -1) if share % size == 0)
    if share % micro:
        return StepDivision(samples, 1, share), (
            f"micro_batch_samples {micro} does not divide the {share} rows that each data-parallel rank has of a step: "
            "use a divisor of it"
        )
    return StepDivision(samples, micro, share // micro), ""
