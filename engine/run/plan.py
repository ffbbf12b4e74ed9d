"""Everything that can be wrong with a run, found before any process group exists and reported at once."""

from pathlib import Path
from typing import NamedTuple

from engine.ds_json.keys import key_problems
from engine.ds_json.legality import illegal_combinations
from engine.ds_json.read import StepDivision, read_ds_config, resolve_ds_config
from engine.layout.mesh import Mesh
from engine.layout.pipeline import pipeline_bounds
from engine.layout.sequence import sequence_problems
from engine.run.initial_weights import initial_weights_problems
from engine.run.stages import Stage, plan_stages
from launch.topology import Topology
from model.config import ModelConfig
from storage.manifest import Manifest
from storage.shards import ShardedDataset, open_split
from training.config import Recipe, config_json_notices, load_recipe
from training.data import TrainingData
from training.objective import recipe_masking
from training.sampler import SampleOrder
from training.schedule import landmarks, lr_factor

FEW_ROWS = 4
"""A validation set with fewer says next to nothing."""


class RunPlan(NamedTuple):
    recipe: Recipe
    ds_config: dict
    mesh: Mesh
    stages: list[Stage]
    """Of the training, in order; one where the recipe has none."""
    validation_sets: dict[str, ShardedDataset]
    pipeline_bounds: list[int]
    """Where the layer plan is cut into pipeline stages; empty without a pipeline."""
    warnings: list[str]

    @property
    def total_steps(self) -> int:
        return self.stages[-1].end

    @property
    def step_tokens(self) -> int:
        """Of every optimizer step, whatever its stage."""
        return self.recipe.training.global_batch_tokens

    @property
    def dataset(self) -> ShardedDataset:
        """Training data of the first stage."""
        return self.stages[0].dataset

    @property
    def batch(self) -> StepDivision:
        """How a step of the first stage is cut, as the DeepSpeed config says."""
        return self.stages[0].batch

    def stage_of(self, step: int) -> Stage:
        """The stage of the optimizer step with this number, counted from 1; after the run's last step its last stage."""
        return next((stage for stage in self.stages if step <= stage.end), self.stages[-1])

    def training_data(self, stage: Stage, order: SampleOrder) -> TrainingData:
        """The batches of a stage in that order, masked if the objective says so, dealt out by attention if the recipe does."""
        masking = recipe_masking(self.recipe, stage.dataset.manifest, f"training from step {stage.begin}")
        visibility = self.recipe.model.visibility if stage.config.balance_attention else None
        return TrainingData(stage.dataset, order, masking, visibility)

    def learning_rate(self, step: int) -> float:
        """Of the optimizer step with this number, counted from 1."""
        factor = lr_factor(self.recipe.schedule, step, self.total_steps, self.step_tokens)
        return factor * self.recipe.optimizer.lr

    @property
    def half_precision(self) -> bool:
        """Whether matrices are multiplied in bf16 or fp16."""
        sections = ("bf16", "fp16", "torch_autocast")
        return any(self.ds_config.get(section, {}).get("enabled", False) for section in sections)


def make_plan(
    recipe_file: str,
    overrides: dict[str, str],
    ds_config_file: str,
    data: str,
    topology: Topology,
    pipeline_stages: int | None = None,
    fresh: bool = True,
) -> RunPlan:
    """Read and cross-check recipe, DeepSpeed JSON and data. Raises ValueError with one line a problem.

    Not `fresh`: a run that has begun continues, without its `training.initial_weights`, which may be gone by now.
    """
    problems: list[str] = []
    recipe = _collect(problems, load_recipe, recipe_file, overrides)
    raw = _collect(problems, read_ds_config, ds_config_file)
    folders = [stage.data or data for stage in recipe.all_stages] if recipe else [data]
    opened = {folder: _collect(problems, open_split, Path(folder), "train") for folder in dict.fromkeys(folders)}
    if recipe is None or None in opened.values():
        problems += [f"{ds_config_file}: {problem}" for problem in key_problems(raw or {})]
        raise ValueError("\n".join(problems))
    data, datasets = folders[0], [opened[folder] for folder in folders]
    dataset, seq_length = datasets[0], datasets[0].manifest.seq_length
    resolved = None
    if raw is not None:
        launch = (recipe, seq_length, topology, pipeline_stages)
        resolved = _collect(problems, resolve_ds_config, raw, ds_config_file, *launch)
    bounds = []
    if resolved is not None and "pipeline" in resolved.config:
        section = resolved.config["pipeline"]
        cut = (recipe.model, section["stages"], section["partition"], seq_length, recipe.objective.copies)
        bounds = _collect(problems, pipeline_bounds, *cut)
    stages, stage_problems = plan_stages(recipe, folders, datasets, resolved)
    for stage in stages:
        stage_problems += model_data_problems(recipe.model, stage.dataset, stage.data)
        if stage.dataset.manifest.tokenizer.sha256 != dataset.manifest.tokenizer.sha256:
            stage_problems.append(f"stages: {stage.name}: {stage.data} was built with another tokenizer than {data}")
    problems += [f"{recipe_file}: {problem}" for problem in dict.fromkeys(stage_problems)]
    sets = _open_validation_sets(recipe, stages, problems)
    if resolved is not None:
        read = [*datasets, *(other for other in sets.values() if other is not None)]
        lengths = sorted({other.manifest.seq_length for other in read})
        found = [p for length in lengths for p in sequence_problems(recipe.model, resolved.mesh, length)]
        for stage in stages[1:]:
            found += illegal_combinations(resolved.config, stage.batch, resolved.mesh, recipe, topology.device)
        problems += [f"{ds_config_file}: {problem}" for problem in dict.fromkeys(found)]
    if fresh and recipe.training.initial_weights:
        problems += initial_weights_problems(recipe, dataset.manifest.tokenizer, data)
    _collect(problems, landmarks, recipe.schedule, stages[-1].end, recipe.training.global_batch_tokens)
    if problems:
        raise ValueError("\n".join(problems))
    warnings = config_json_notices(recipe_file, overrides, fresh)
    warnings += [f"{recipe_file}: schedule.{key} has no effect here" for key in recipe.schedule.without_effect()]
    if recipe.model.vocab_size > dataset.manifest.tokenizer.vocab_size:
        unused = recipe.model.vocab_size - dataset.manifest.tokenizer.vocab_size
        warnings.append(
            f"{recipe_file}: model.vocab_size has {unused} entries more than the tokenizer; they stay untrained"
        )
    warnings += export_notices(data, dataset.manifest, recipe.model.vocab_size, topology.is_first)
    if recipe.model.position_embedding != "rope":
        warnings.append(
            f"{recipe_file}: transformers has no LLaMA with model.position_embedding {recipe.model.position_embedding}: this "
            "model can be evaluated and used here, but not exported"
        )
    warnings += [f"{ds_config_file}: {notice}" for notice in resolved.notices]
    warnings += [
        f"validation set {name} has {len(other)} {'row' if len(other) == 1 else 'rows'} of {other.manifest.seq_length} tokens: "
        "its loss is noise; build with more documents or a larger --validation-fraction"
        for name, other in sets.items()
        if len(other) < FEW_ROWS
    ]
    if "gradient_compression" in resolved.config and topology.world_size == 1:
        warnings.append(f"{ds_config_file}: gradient_compression has no effect on one rank")
    return RunPlan(recipe, resolved.config, resolved.mesh, stages, sets, bounds, warnings)


def export_notices(data: str, manifest: Manifest, vocab_size: int, first: bool) -> list[str]:
    """What an export will not keep of the tokenizer, as the build found; of older data sets the `first` rank looks for it."""
    found = manifest.statistics
    if first and "tokenizer_names_without_entry" not in found:
        from data_prep.foresee import foreseen_of

        found = foreseen_of(Path(data) / manifest.tokenizer.file)
    notices = []
    if reason := found.get("tokenizer_needs_own_code"):
        notices.append(
            f"{data}: the tokenizer has no exact equivalent in transformers ({reason}): an export of the model comes with "
            "code for it, which transformers runs with trust_remote_code=True"
        )
    if names := found.get("tokenizer_names_without_entry"):
        spare = vocab_size - manifest.tokenizer.vocab_size
        unless = (
            f", unless it finds room for them in the {spare} entries that model.vocab_size has more" if spare else ""
        )
        notices.append(
            f"{data}: the tokenizer has no entries for tokens that the files beside it name ({', '.join(names)}): an export of "
            f"the model leaves them out{unless}"
        )
    return notices


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


def _open_validation_sets(recipe: Recipe, stages: list[Stage], problems: list[str]) -> dict[str, ShardedDataset]:
    """Those of all stages, from the first step to the last: so the curves say what each stage does to every length."""
    if recipe.validation.every_steps is None:
        return {}
    sets, dataset, data = {}, stages[0].dataset, stages[0].data
    first_of_folder = {stage.data: stage for stage in reversed(stages)}
    for stage in stages:
        if "validation" in stage.dataset.manifest.splits and first_of_folder[stage.data] is stage:
            name = "validation" if stage is stages[0] else f"validation_{stage.name}"
            sets[name] = _collect(problems, open_split, Path(stage.data), "validation")
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


def _collect(problems: list[str], function, *arguments):
    """Call; on ValueError note its sentences and return None."""
    try:
        return function(*arguments)
    except ValueError as error:
        problems += str(error).splitlines()
        return None
