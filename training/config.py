"""The recipe: one YAML file that says what is trained. How it is executed is the DeepSpeed JSON's business.

Reading never stops at the first mistake: every unknown key (with the nearest known name) and every bad value is
collected, and one ValueError lists them all with the file or the flag they come from.
"""

import argparse
import difflib
import textwrap
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError, model_validator
from pydantic_core import ErrorDetails

from model.adapter_config import AdaptersConfig
from model.config import ModelConfig
from model.hf.config import left_out, read_hf_config
from training.foreign_names import TRANSFORMERS_NAMES
from training.schedule import ScheduleConfig
from training.sections import DataConfig, MetricsConfig, ObjectiveConfig, OptimizerConfig, StageConfig
from training.spikes import SpikesConfig
from training.yaml_files import read_yaml, yaml_value


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class TrainingConfig(Section):
    seed: int = Field(default=0, ge=0)
    """Seed of the initial weights and of the order of the samples."""
    initial_weights: str | None = None
    """What to start from instead of random weights: a Hugging Face folder, a run's folder (its newest good checkpoint) or one
    checkpoint of it. Positions may differ (rope_scaling, rope_theta, max_position_embeddings): longer rows, say."""
    global_batch_tokens: int = Field(ge=1)
    """Tokens per optimizer step over all ranks; a multiple of the data's sequence length."""
    micro_batch_samples: int = Field(default=1, ge=1)
    """Rows per rank and forward pass (of the first stage) when the DeepSpeed JSON says "auto"."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after this many optimizer steps. With `stages` their sum, and best left out; likewise max_tokens."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Stop after this many tokens (rounded up to whole steps)."""
    max_hours: float | None = Field(default=None, gt=0)
    """Stop after this much wall time of this launch, with a checkpoint; the next launch continues."""
    z_loss_weight: float = Field(default=0.0, ge=0)
    """Weight of the mean squared log-partition added to the loss (PaLM, section 5)."""
    activation_checkpointing: bool | NonNegativeInt | Literal["auto"] = False
    """Recompute blocks in backward (true: all; a number: so many, evenly; auto: so many that it fits): a third more work."""
    compile: bool = False
    """torch.compile each block, attention excepted: a minute or more at the start, then less memory traffic on GPUs."""
    attention_kernel: Literal["auto", "flash", "products"] = "auto"
    """Of causal attention in bf16 on CPUs: torch's flash attention, products of blocks, or what a second's test finds faster."""
    max_consecutive_skipped_steps: int = Field(default=10, ge=1)
    """Give up after this many steps in a row that were not applied: their loss or gradient was not finite, or a spike."""
    spikes: SpikesConfig | None = None
    """What is done about steps whose loss or gradient norm stands out or is not finite: `policy` skip, rewind or reorder,
    `window_steps`, `threshold`, `max_decisions`. null: what is not finite is skipped, the rest is applied."""
    collective_timeout_minutes: float = Field(default=30.0, gt=0)
    """End when a rank has waited this long for another: longer than any rank may compute or read while the others wait."""
    hang_seconds: float | None = Field(default=20.0, gt=0)
    """End with code 76 where a step takes so much longer than twice its usual time; all stacks are in RUN/stacks. null: never."""

    @model_validator(mode="after")
    def _has_one_length(self) -> Self:
        if self.max_steps and self.max_tokens:
            raise ValueError("give exactly one of training.max_steps and training.max_tokens")
        return self


class ValidationConfig(Section):
    every_steps: int | None = Field(default=None, ge=1)
    """Validate every so many steps and after the last; null: never."""
    max_samples: int | None = Field(default=None, ge=1)
    """Rows taken of each set, evenly spread over it; null: all."""
    sets: dict[str, str] = {}
    """Further named data sets (name: folder made by data_prep.build); --data's own validation split is "validation"."""


class CheckpointConfig(Section):
    every_steps: int = Field(default=1000, ge=1)
    """Save every so many steps; the last step is always saved."""
    keep_last: int = Field(default=3, ge=2)
    """Newest checkpoints kept; at least two, so that a damaged one has a good one before it."""
    keep_every_steps: int | None = Field(default=None, ge=1)
    """Checkpoints at multiples of this step are never deleted."""
    background: bool = True
    """Write behind the training, which stands still only while host memory takes a copy; off: no copy, no write behind."""


class Recipe(Section):
    model: ModelConfig
    training: TrainingConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    adapters: AdaptersConfig = AdaptersConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    data: DataConfig = DataConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: MetricsConfig = MetricsConfig()
    stages: list[StageConfig] = []
    """Stretches of the run with their own data, row length and mixture; none: one of the whole length over --data."""

    @model_validator(mode="before")
    @classmethod
    def _objective_decides_what_is_seen(cls, tree: Any) -> Any:
        """`model.is_causal` follows from the objective; the model keeps it, since it decides what the model computes."""
        if not isinstance(tree, dict) or not isinstance(tree.get("model"), dict):
            return tree
        objective = tree.get("objective") or {}
        name = objective.get("name", "causal") if isinstance(objective, dict) else getattr(objective, "name", "causal")
        both_sides = name in ("masked", "block_diffusion")
        return tree | {"model": {"is_causal": False} | tree["model"]} if both_sides else tree

    @model_validator(mode="before")
    @classmethod
    def _adapters_are_the_models(cls, tree: Any) -> Any:
        """The model keeps the section, since it decides which parameters there are."""
        if not isinstance(tree, dict) or not isinstance(tree.get("model"), dict) or "adapters" not in tree:
            return tree
        try:
            adapters = AdaptersConfig.model_validate(tree["adapters"])
        except ValidationError:
            return tree  # said of the section itself
        return tree | {"model": {"adapters": adapters} | tree["model"]}

    @model_validator(mode="after")
    def _adapters_can_be_trained(self) -> Self:
        if self.model.adapters != self.adapters:
            raise ValueError("adapters: give them in their own section, not in model")
        if self.adapters.names and self.objective.masks:
            raise ValueError(
                f"adapters are trained on the objectives causal and contrastive, not {self.objective.name}"
            )
        if self.adapters.initial_weights and self.training.initial_weights is None:
            raise ValueError("adapters.initial_weights belong to a base: name it in training.initial_weights")
        if self.adapters.mode == "mixture" and self.training.z_loss_weight:
            raise ValueError("training.z_loss_weight has no meaning for a mixture of adapters: leave it out")
        if self.adapters.names and self.optimizer.name != "adamw":
            raise ValueError(f"adapters are trained by the optimizer adamw, not {self.optimizer.name}")
        return self

    @model_validator(mode="after")
    def _model_can_do_the_objective(self) -> Self:
        name = self.objective.name
        if self.model.is_causal == self.objective.masks:
            raise ValueError(
                f"model.is_causal {self.model.is_causal} contradicts objective.name {name}: leave model.is_causal out"
            )
        if name == "block_diffusion" and self.model.chunk_size is None:
            raise ValueError(
                "objective.name block_diffusion works in chunks: set model.attention to chunked, and chunk_size"
            )
        return self

    @model_validator(mode="after")
    def _contrasts_for_one_adapter(self) -> Self:
        if self.objective.name != "contrastive":
            return self
        if self.adapters.mode != "single" or self.adapters.train_base:
            raise ValueError(
                "objective.name contrastive trains one adapter on a base that stays: set adapters.mode to single"
            )
        if self.training.z_loss_weight:
            raise ValueError("training.z_loss_weight has no meaning for the objective contrastive: leave it out")
        if self.validation.every_steps is not None:
            raise ValueError(
                "validation.every_steps: a contrastive loss depends on how many pairs meet, so set it to null, and measure "
                "retrieval by tools.embed --evaluate"
            )
        return self

    @model_validator(mode="after")
    def _numbers_agree(self) -> Self:
        recomputed, blocks = self.training.activation_checkpointing, self.model.num_hidden_layers
        if recomputed != "auto" and recomputed > blocks:
            raise ValueError(f"training.activation_checkpointing {recomputed} is more than the model's {blocks} blocks")
        key = "max_steps" if self.training.max_steps else "max_tokens"
        if getattr(self.training, key) is None:
            if not self.stages:
                raise ValueError("training: give exactly one of training.max_steps and training.max_tokens, or stages")
            return self
        step_tokens = self.training.global_batch_tokens
        whole = StageConfig(**{key: getattr(self.training, key)}).steps(step_tokens)
        steps = sum(stage.steps(step_tokens) for stage in self.all_stages)
        if whole != steps:
            raise ValueError(
                f"training.{key} makes {whole} steps but the stages add up to {steps}: leave it out or make them agree"
            )
        return self

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [stage.name for stage in self.all_stages if stage.name] if self.stages else []
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"stages: two are called {twice[0]!r}: give each a name of its own")
        return self

    @property
    def all_stages(self) -> list[StageConfig]:
        """The stages, each with a name; where the recipe has none, the whole run is one."""
        length: dict[str, Any] = {"max_steps": self.training.max_steps, "max_tokens": self.training.max_tokens}
        stages = self.stages or [StageConfig(**length)]
        return [
            stage.model_copy(update={"name": stage.name or f"stage-{number}"})
            for number, stage in enumerate(stages, start=1)
        ]


def add_recipe_flags(parser: argparse.ArgumentParser, explained: bool = True) -> None:
    """Add one `--section.key` flag per recipe field, its help being the text under the field, and `--stages`.

    Not `explained`: the help has the names of each section's keys instead.
    """
    text = "override the recipe file; values are YAML, as in --optimizer.lr 3e-4"
    if not explained:
        text += ".\n" + "\n".join(
            textwrap.fill(f"{name}: {', '.join(keys)}", 98, initial_indent="  ", subsequent_indent="      ")
            for name, keys in _flags_of_sections().items()
        )
    group = parser.add_argument_group("recipe keys, --section.key VALUE", text)
    sections = _sections()
    for section, field in Recipe.model_fields.items():
        if section == "stages":
            text = f"{field.description} Keys of each: {', '.join(StageConfig.model_fields)} (default: none)"
            text = text if explained else argparse.SUPPRESS
            group.add_argument("--stages", default=argparse.SUPPRESS, metavar="LIST", help=text)
            continue
        for key, leaf in sections[section].model_fields.items():
            default = "required" if leaf.is_required() else f"default: {leaf.get_default(call_default_factory=True)}"
            text = f"{leaf.description or ''} ({default})".replace("%", "%%") if explained else argparse.SUPPRESS
            group.add_argument(f"--{section}.{key}", default=argparse.SUPPRESS, metavar="VALUE", help=text)


def _sections() -> dict[str, type[BaseModel]]:
    kinds = {name: field.annotation for name, field in Recipe.model_fields.items()}
    return {name: kind for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, BaseModel)}


def _flags_of_sections() -> dict[str, list[str]]:
    return {name: list(section.model_fields) for name, section in _sections().items()} | {
        "--stages LIST": list(StageConfig.model_fields)
    }


def load_recipe(path: str | Path, overrides: dict[str, str]) -> Recipe:
    """Read a recipe file and apply `{"section.key": "YAML value"}` overrides (`stages` as a whole).

    `model` may hold `config_json: FILE`, a Hugging Face config.json whose values the other keys override.
    Raises ValueError listing every problem, one a line.
    """
    path = Path(path)
    tree = _read_tree(path, overrides)
    if (file := _config_json(path, tree)) is not None:
        section = {key: value for key, value in tree["model"].items() if key != "config_json"}
        tree["model"] = {**ModelConfig.from_hf(file).model_dump(exclude_unset=True), **section}
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise ValueError("\n".join(_sentence(path, overrides, problem) for problem in error.errors())) from None


def config_json_notices(path: str | Path, overrides: dict[str, str], fresh: bool = True) -> list[str]:
    """What `config.json` files that a valid recipe names have that the model does not take over.

    They are that of `model.config_json` and, in a `fresh` run, that of a Hugging Face folder in `training.initial_weights`.
    """
    tree = _read_tree(Path(path), overrides)
    files = [_config_json(Path(path), tree)]
    if fresh and (start := tree["training"].get("initial_weights")):
        files.append(Path(start) / "config.json")
    unique = {file.resolve(): file for file in files if file and file.is_file()}
    return [
        f"{file}: {said}"
        for file in unique.values()
        for said in left_out(read_hf_config(file)[0], set(ModelConfig.model_fields))
    ]


def _read_tree(path: Path, overrides: dict[str, str]) -> dict[str, Any]:
    tree = read_yaml(path)
    for dotted, text in overrides.items():
        section, _, key = dotted.partition(".")
        if section == "stages":
            tree[section] = yaml_value(text, "--stages")
            continue
        tree.setdefault(section, {})
        if not isinstance(tree[section], dict):
            raise ValueError(f"{path}: {section} must be a mapping of keys to values")
        tree[section][key] = yaml_value(text, f"--{dotted}")
    return tree


def _config_json(recipe: Path, tree: dict[str, Any]) -> Path | None:
    if not isinstance(tree.get("model"), dict) or "config_json" not in tree["model"]:
        return None
    file = Path(str(tree["model"]["config_json"]))
    file = file if file.is_absolute() or file.exists() else recipe.parent / file
    if not file.is_file():
        raise ValueError(f"{recipe}: model.config_json: {file} does not exist")
    return file


def _sentence(path: Path, overrides: dict[str, str], problem: ErrorDetails) -> str:
    location = [str(part) for part in problem["loc"]]
    dotted = ".".join(location)
    given = dotted in overrides or (location[:1] == ["stages"] and "stages" in overrides)
    where = f"--{dotted}" if given else f"{path}: {dotted}"
    if problem["type"] == "extra_forbidden":
        elsewhere = "stages" not in location and _key_elsewhere(location[-1])
        known = did_you_mean(location[-1], _known_keys(location[:-1]))
        return f"{where}: unknown key{f'; did you mean {elsewhere!r}?' if elsewhere else known}"
    if problem["type"] == "missing":
        return f"{path}: {dotted} is required"
    message = problem["msg"].removeprefix("Value error, ")
    if not location or problem["type"] == "value_error":
        return f"{where}: {message}".replace(": : ", ": ")
    return f"{where}: {message[0].lower()}{message[1:]}, got {problem['input']!r}"


def _known_keys(parents: list[str]) -> list[str]:
    if not parents:
        return list(Recipe.model_fields)
    if parents[0] == "stages":
        return list(StageConfig.model_fields)
    section = _sections().get(parents[0])
    extra = ["config_json"] if parents[0] == "model" else []
    return [*section.model_fields, *extra] if section and len(parents) == 1 else []


def _key_elsewhere(key: str) -> str | None:
    """The dotted key that `transformers` calls so, or the only one of that name in any section."""
    sections = [name for name in Recipe.model_fields if name != "stages" and key in _known_keys([name])]
    return TRANSFORMERS_NAMES.get(key, f"{sections[0]}.{key}" if len(sections) == 1 else None)


def hints_for_flags() -> dict[str, str]:
    """Sentences, for `CommandParser`, about flags whose key is in another section or has another name here."""
    fields = {key for section in Recipe.model_fields for key in _known_keys([section])}
    places = {key: _key_elsewhere(key) for key in fields | TRANSFORMERS_NAMES.keys()}
    prefixes = ["--", *(f"--{section}." for section in Recipe.model_fields)]
    flags = {f"{prefix}{key}": f"--{place}" for key, place in places.items() if place for prefix in prefixes}
    return {flag: f"did you mean {right}?" for flag, right in flags.items() if flag != right}


def did_you_mean(key: str, known: list[str]) -> str:
    """`; did you mean 'x'?` for the nearest of the known names, else a list of them, else nothing."""
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"; did you mean {nearest[0]!r}?" if nearest else (f"; known: {', '.join(sorted(known))}" if known else "")
