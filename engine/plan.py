"""Everything that can be wrong with a run, found before any process group exists and reported at once."""

from pathlib import Path
from typing import NamedTuple

from engine.ds_config import Batch, read_ds_config, resolve_ds_config
from engine.ds_keys import key_problems
from engine.mesh import Mesh
from engine.pipeline import stage_bounds
from engine.sequence import sequence_problems
from engine.topology import Topology
from model.config import ModelConfig
from training.config import Recipe, load_recipe
from training.schedule import landmarks, lr_factor
from training.shards import ShardedDataset, open_split


class RunPlan(NamedTuple):
    recipe: Recipe
    ds_config: dict
    batch: Batch
    mesh: Mesh
    dataset: ShardedDataset
    validation_sets: dict[str, ShardedDataset]
    total_steps: int
    stage_bounds: list[int]
    """Where the layer plan is cut into pipeline stages; empty without a pipeline."""
    warnings: list[str]

    @property
    def step_tokens(self) -> int:
        return self.batch.samples * self.dataset.manifest.seq_length

    def learning_rate(self, step: int) -> float:
        """Of the optimizer step with this number, counted from 1."""
        factor = lr_factor(self.recipe.schedule, step, self.total_steps, self.step_tokens)
        return factor * self.recipe.optimizer.lr

    @property
    def half_precision(self) -> bool:
        """Whether matrices are multiplied in bf16 or fp16."""
        sections = ("bf16", "fp16", "torch_autocast")
        return any(self.ds_config.get(section, {}).get("enabled", False) for section in sections)

    @property
    def mean_document_tokens(self) -> float:
        """Average stretch of one row over which attention runs, for the count of FLOPs."""
        sources = self.dataset.manifest.splits[self.dataset.split].values()
        documents, tokens = sum(s.documents for s in sources), sum(s.tokens for s in sources)
        return min(self.dataset.manifest.seq_length, tokens / documents)


def make_plan(
    recipe_file: str,
    overrides: dict[str, str],
    ds_config_file: str,
    data: str,
    topology: Topology,
    pipeline_stages: int | None = None,
) -> RunPlan:
    """Read and cross-check recipe, DeepSpeed JSON and data. Raises ValueError with one line a problem."""
    problems: list[str] = []
    recipe = _collect(problems, load_recipe, recipe_file, overrides)
    raw = _collect(problems, read_ds_config, ds_config_file)
    dataset = _collect(problems, open_split, Path(data), "train")
    if recipe is None or dataset is None:
        problems += [f"{ds_config_file}: {problem}" for problem in key_problems(raw or {})]
        raise ValueError("\n".join(problems))
    seq_length = dataset.manifest.seq_length
    resolved = None
    if raw is not None:
        launch = (recipe, seq_length, topology, pipeline_stages)
        resolved = _collect(problems, resolve_ds_config, raw, ds_config_file, *launch)
    bounds = []
    if resolved is not None and "pipeline" in resolved.config:
        pipeline, model = resolved.config["pipeline"], recipe.model
        bounds = _collect(problems, stage_bounds, model, pipeline["stages"], pipeline["partition"], seq_length)
    problems += [f"{recipe_file}: {problem}" for problem in model_data_problems(recipe.model, dataset, data)]
    sets = _open_validation_sets(recipe, dataset, data, problems)
    if resolved is not None:
        lengths = {seq_length, *(other.manifest.seq_length for other in sets.values() if other is not None)}
        found = [p for length in sorted(lengths) for p in sequence_problems(recipe.model, resolved.mesh, length)]
        problems += [f"{ds_config_file}: {problem}" for problem in dict.fromkeys(found)]
    if recipe.training.initial_weights:
        problems += _initial_weights_problems(recipe)
    total_steps = recipe.training.max_steps or -(-recipe.training.max_tokens // recipe.training.global_batch_tokens)
    _collect(problems, landmarks, recipe.schedule, total_steps, recipe.training.global_batch_tokens)
    if problems:
        raise ValueError("\n".join(problems))
    warnings = [f"{recipe_file}: schedule.{key} has no effect here" for key in recipe.schedule.without_effect()]
    if recipe.model.vocab_size > dataset.manifest.tokenizer.vocab_size:
        unused = recipe.model.vocab_size - dataset.manifest.tokenizer.vocab_size
        warnings.append(
            f"{recipe_file}: model.vocab_size has {unused} entries more than the tokenizer; they stay untrained"
        )
    if "gradient_compression" in resolved.config and topology.world_size == 1:
        warnings.append(f"{ds_config_file}: gradient_compression has no effect on one rank")
    return RunPlan(recipe, *resolved, dataset, sets, total_steps, bounds, warnings)


def model_data_problems(model: ModelConfig, dataset: ShardedDataset, data: str) -> list[str]:
    """Why this model cannot train or be evaluated on these shards."""
    manifest, problems = dataset.manifest, []
    if model.vocab_size < manifest.tokenizer.vocab_size:
        problems.append(
            f"model.vocab_size is {model.vocab_size} but the tokenizer of {data} has {manifest.tokenizer.vocab_size} "
            "entries: set model.vocab_size to that"
        )
    if model.max_position_embeddings < manifest.seq_length:
        problems.append(
            f"model.max_position_embeddings is {model.max_position_embeddings} but the rows of {data} have "
            f"{manifest.seq_length} tokens: raise it, or build the data with a smaller --seq-length"
        )
    return problems


def _open_validation_sets(recipe: Recipe, dataset, data: str, problems: list[str]) -> dict[str, ShardedDataset]:
    if recipe.validation.every_steps is None:
        return {}
    sets = {}
    if "validation" in dataset.manifest.splits:
        sets["validation"] = _collect(problems, open_split, Path(data), "validation")
    for name, path in recipe.validation.sets.items():
        other = _collect(problems, open_split, Path(path), "validation")
        if other is not None and other.manifest.tokenizer.sha256 != dataset.manifest.tokenizer.sha256:
            problems.append(f"validation.sets.{name}: {path} was built with another tokenizer than {data}")
        elif other is not None:
            problems += [f"validation.sets.{name}: {p}" for p in model_data_problems(recipe.model, other, path)]
        sets[name] = other
    if not sets:
        problems.append(
            f"validation.every_steps is set but {data} has no validation split and validation.sets is empty: build the "
            "data with one, or set validation.every_steps to null"
        )
    return sets


def _initial_weights_problems(recipe: Recipe) -> list[str]:
    folder = recipe.training.initial_weights
    try:
        theirs, ours = ModelConfig.from_hf(folder).model_dump(), recipe.model.model_dump()
    except ValueError as error:
        return [f"training.initial_weights: {error}"]
    free = {"max_position_embeddings", "rope_theta", "rope_scaling", "initializer_range", "sliding_window"}
    different = [key for key in ours if key not in free and _filled(ours, key) != _filled(theirs, key)]
    return [
        f"training.initial_weights: {folder} has {key} {theirs[key]!r} but the recipe's model.{key} is {ours[key]!r}"
        for key in different
    ]


def _filled(model: dict, key: str):
    if key == "num_key_value_heads":
        return model[key] or model["num_attention_heads"]
    if key == "head_dim":
        return model[key] or model["hidden_size"] // model["num_attention_heads"]
    return model[key]


def _collect(problems: list[str], function, *arguments):
    """Call; on ValueError note its sentences and return None."""
    try:
        return function(*arguments)
    except ValueError as error:
        problems += str(error).splitlines()
        return None
