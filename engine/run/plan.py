"""Everything that can be wrong with a run, found before any process group exists and reported at once."""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

from engine.ds_json.keys import key_problems
from engine.ds_json.legality import illegal_combinations
from engine.ds_json.read import Resolved, StepDivision, read_ds_config, resolve_ds_config
from engine.layout.mesh import EXCHANGE, Mesh
from engine.layout.pipeline import pipeline_bounds, untrained_stages
from engine.layout.sequence import sequence_problems
from engine.run.initial_weights import initial_weights_problems
from engine.run.stages import Stage, plan_stages
from launch.hostfile import across_hosts
from launch.topology import Topology
from model.config import ModelConfig
from storage.manifest import Manifest
from storage.shards import ShardedDataset, open_split
from training.config import Recipe, config_json_notices, load_recipe
from training.data import TrainingData
from training.objective import recipe_masking
from training.pairs import PairedTexts
from training.routing import idle_problems, labels_of_sources, routing_problems
from training.sampler import SampleOrder
from training.schedule import landmarks, lr_factor

P = ParamSpec("P")
R = TypeVar("R")

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
    def sources(self) -> tuple[str, ...]:
        """Names in all data that the run reads."""
        read = [*(stage.dataset for stage in self.stages), *self.validation_sets.values()]
        return tuple(sorted({source for dataset in read for source in dataset.sources}))

    @property
    def batch(self) -> StepDivision:
        """How a step of the first stage is cut, as the DeepSpeed config says."""
        return self.stages[0].batch

    def stage_of(self, step: int) -> Stage:
        """The stage of the optimizer step with this number, counted from 1; after the run's last step its last stage."""
        return next((stage for stage in self.stages if step <= stage.end), self.stages[-1])

    def training_data(self, stage: Stage, order: SampleOrder) -> TrainingData:
        """The batches of a stage in that order, masked if the objective says so, dealt out by attention if the recipe does."""
        manifest, pairs = stage.dataset.manifest, self.recipe.objective.name == "contrastive"
        change = (
            PairedTexts(manifest)
            if pairs
            else recipe_masking(self.recipe, manifest, f"training from step {stage.begin}")
        )
        visibility = self.recipe.model.visibility if stage.config.balance_attention else None
        labels = labels_of_sources(self.recipe.adapters, stage.dataset, self.sources)
        seed = self.recipe.training.seed if self.recipe.adapters.lora_dropout else None
        return TrainingData(stage.dataset, order, change, visibility, labels, seed)

    def learning_rate(self, step: int) -> float:
        """Of the optimizer step with this number, counted from 1."""
        factor = lr_factor(self.recipe.schedule, step, self.total_steps, self.step_tokens)
        return factor * self.recipe.optimizer.lr

    def validates_after(self, step: int) -> bool:
        """Whether the sets are validated after the optimizer step with this number."""
        every = self.recipe.validation.every_steps
        return every is not None and (step == self.total_steps or step % every == 0)

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
    degrees: Mapping[str, int | None] | None = None,
    fresh: bool = True,
) -> RunPlan:
    """Read and cross-check recipe, DeepSpeed JSON and data. Raises ValueError with one line a problem.

    Not `fresh`: a run that has begun continues, without its `training.initial_weights`, which may be gone by now.
    """
    problems: list[str] = []
    recipe, ds_config, opened = _read(recipe_file, overrides, ds_config_file, data, problems)
    resolved, bounds = _lay_out(recipe, ds_config, ds_config_file, opened[0], topology, degrees, problems)
    stages, sets = _open_stages(recipe, recipe_file, opened, resolved, problems)
    _cross_check(recipe, ds_config_file, resolved, stages, sets, topology, fresh, problems)
    if problems:
        raise ValueError("\n".join(problems))
    assert resolved is not None
    plan = RunPlan(recipe, resolved.config, resolved.mesh, stages, sets, bounds, [])
    notices = config_json_notices(recipe_file, overrides, fresh) + _notices(plan, recipe_file)
    notices += [f"{ds_config_file}: {notice}" for notice in resolved.notices]
    hosts, more = divmod(topology.world_size, topology.local_size)
    if sentence := across_hosts(plan.mesh.tensor, [topology.local_size] * hosts + [more] * (more > 0)):
        notices.append(f"{ds_config_file}: {sentence}")
    notices += [f"{ds_config_file}: {key} has no effect {where}" for key, where in _without_others(plan).items()]
    return plan._replace(warnings=notices)


class OpenData(NamedTuple):
    """The training split of a stage."""

    folder: str
    dataset: ShardedDataset


def _read(
    recipe_file: str, overrides: dict[str, str], ds_config_file: str, data: str, problems: list[str]
) -> tuple[Recipe, dict[str, Any] | None, list[OpenData]]:
    """What the user named: recipe, JSON (None: it cannot be read) and the data of each stage.

    Raises ValueError, with all that is wrong so far, where recipe or data cannot be read.
    """
    recipe = _collect(problems, load_recipe, recipe_file, overrides)
    ds_config = _collect(problems, read_ds_config, ds_config_file)
    folders = [stage.data or data for stage in recipe.all_stages] if recipe else [data]
    found = {folder: _collect(problems, open_split, Path(folder), "train") for folder in dict.fromkeys(folders)}
    opened = {folder: OpenData(folder, dataset) for folder, dataset in found.items() if dataset is not None}
    if recipe is None or len(opened) < len(found):
        problems += [f"{ds_config_file}: {problem}" for problem in key_problems(ds_config or {})]
        raise ValueError("\n".join(problems))
    return recipe, ds_config, [opened[folder] for folder in folders]


def _lay_out(
    recipe: Recipe,
    ds_config: dict[str, Any] | None,
    ds_config_file: str,
    first: OpenData,
    topology: Topology,
    degrees: Mapping[str, int | None] | None,
    problems: list[str],
) -> tuple[Resolved | None, list[int]]:
    """How the ranks hold the run: the filled JSON (None: it is wrong) and where a pipeline divides the layers."""
    if ds_config is None:
        return None, []
    seq_length = first.dataset.manifest.seq_length
    resolved = _collect(problems, resolve_ds_config, ds_config, ds_config_file, recipe, seq_length, topology, degrees)
    if resolved is None or "pipeline" not in resolved.config:
        return resolved, []
    section, copies = resolved.config["pipeline"], recipe.objective.copies
    stages, partition = section["stages"], section["partition"]
    bounds = _collect(problems, pipeline_bounds, recipe.model, stages, partition, seq_length, copies) or []
    if idle := untrained_stages(recipe.model, bounds):
        problems.append(
            f"{ds_config_file}: rank {idle[0]} of the pipeline would have no adapters to train, since adapters.last_layers is "
            f"{recipe.adapters.last_layers}: raise it, or use fewer pipeline stages"
        )
    return resolved, bounds


def _open_stages(
    recipe: Recipe, recipe_file: str, opened: list[OpenData], resolved: Resolved | None, problems: list[str]
) -> tuple[list[Stage], dict[str, ShardedDataset]]:
    """What is trained on, stage by stage, and the validation sets that are open."""
    first = opened[0]
    stages, found = plan_stages(recipe, [each.folder for each in opened], [each.dataset for each in opened], resolved)
    found += idle_problems(recipe.adapters, [stage.dataset for stage in stages])
    for stage in stages:
        found += model_data_problems(recipe.model, stage.dataset, stage.data)
        if recipe.objective.name == "contrastive" and not stage.dataset.manifest.target_spans:
            found.append(
                f"objective.name contrastive needs pairs, and {stage.data} has texts: build it with --prompt-field and "
                "--response-field"
            )
        if stage.dataset.manifest.tokenizer.sha256 != first.dataset.manifest.tokenizer.sha256:
            found.append(f"stages: {stage.name}: {stage.data} was built with another tokenizer than {first.folder}")
    problems += [f"{recipe_file}: {problem}" for problem in dict.fromkeys(found)]
    return stages, _open_validation_sets(recipe, stages, problems)


def _cross_check(
    recipe: Recipe,
    ds_config_file: str,
    resolved: Resolved | None,
    stages: list[Stage],
    sets: dict[str, ShardedDataset],
    topology: Topology,
    fresh: bool,
    problems: list[str],
) -> None:
    """What only recipe, layout and data together show."""
    read = [*(stage.dataset for stage in stages), *sets.values()]
    problems += dict.fromkeys(problem for dataset in read for problem in routing_problems(recipe.adapters, dataset))
    if resolved is not None:
        lengths = sorted({dataset.manifest.seq_length for dataset in read})
        found = [p for length in lengths for p in sequence_problems(recipe.model, resolved.mesh, length)]
        for stage in stages[1:]:
            found += illegal_combinations(
                resolved.config, stage.batch.accumulation, resolved.mesh, recipe, topology.device
            )
        problems += [f"{ds_config_file}: {problem}" for problem in dict.fromkeys(found)]
    if (fresh or recipe.adapters.freeze_base) and recipe.training.initial_weights:
        first = stages[0]
        problems += initial_weights_problems(recipe, first.dataset.manifest.tokenizer, first.data)
    _collect(problems, landmarks, recipe.schedule, stages[-1].end, recipe.training.global_batch_tokens)
    if recipe.logging.tensorboard and find_spec("tensorboard") is None:
        problems.append("logging.tensorboard needs a package: pip install -r requirements-extra.txt")


def _without_others(plan: RunPlan) -> dict[str, str]:
    """Keys of the JSON about what ranks do together and here do alone, and on what."""
    mesh, config, found = plan.mesh, plan.ds_config, {}
    if mesh.world_size == 1 and "gradient_compression" in config:
        found["gradient_compression"] = "on one rank"
    if mesh.sequence == 1 and EXCHANGE in config:
        found[EXCHANGE] = "with sequence_parallel_size 1"
    if mesh.tensor == 1 and config.get("tensor_parallel", {}).get("split_rows"):
        found["tensor_parallel.split_rows"] = "with autotp_size 1"
    return found


def _notices(plan: RunPlan, recipe_file: str) -> list[str]:
    """What a run may do, but its user should know before it takes days."""
    recipe, first = plan.recipe, plan.stages[0]
    manifest = first.dataset.manifest
    notices = [f"{recipe_file}: schedule.{key} has no effect here" for key in recipe.schedule.without_effect()]
    if recipe.model.vocab_size > manifest.tokenizer.vocab_size:
        unused = recipe.model.vocab_size - manifest.tokenizer.vocab_size
        notices.append(
            f"{recipe_file}: model.vocab_size has {unused} entries more than the tokenizer; they stay untrained"
        )
    notices += _export_notices(first.data, manifest, recipe.model.vocab_size, plan.mesh.rank == 0)
    if recipe.model.position_embedding != "rope":
        notices.append(
            f"{recipe_file}: transformers has no LLaMA with model.position_embedding {recipe.model.position_embedding}: this "
            "model can be evaluated and used here, but not exported"
        )
    for name, other in plan.validation_sets.items():
        if len(other) < FEW_ROWS:
            rows = "1 row" if len(other) == 1 else f"{len(other)} rows"
            notices.append(
                f"validation set {name} has {rows} of {other.manifest.seq_length} tokens: its loss is noise; build with more "
                "documents or a larger --validation-fraction"
            )
    return notices


def _export_notices(data: str, manifest: Manifest, vocab_size: int, first: bool) -> list[str]:
    """What an export will not keep of the tokenizer, as the build found; of older data sets the `first` rank looks for it."""
    found: dict[str, Any] = manifest.statistics
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
        other = sets[name] = _collect(problems, open_split, Path(path), "validation")
        if other is not None and other.manifest.tokenizer.sha256 != dataset.manifest.tokenizer.sha256:
            problems.append(f"validation.sets.{name}: {path} was built with another tokenizer than {data}")
        elif other is not None:
            problems += [f"validation.sets.{name}: {p}" for p in model_data_problems(recipe.model, other, path)]
    if not sets:
        problems.append(
            f"validation.every_steps is set but {data} has no validation split and validation.sets is empty: build the "
            "data with one, or set validation.every_steps to null"
        )
    return {name: dataset for name, dataset in sets.items() if dataset is not None}


def _collect(problems: list[str], function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R | None:
    """Call; on ValueError note its sentences and return None."""
    try:
        return function(*args, **kwargs)
    except ValueError as error:
        problems += str(error).splitlines()
        return None
