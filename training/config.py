"""The recipe: one YAML file that says what is trained. How it is executed is the DeepSpeed JSON's business.

Reading never stops at the first mistake: every unknown key (with the nearest known name) and every bad value is
collected, and one ValueError lists them all with the file or the flag they come from.
"""

import argparse
import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from model.config import ModelConfig
from training.data import DataConfig
from training.metrics import MetricsConfig
from training.optimizer import OptimizerConfig
from training.schedule import ScheduleConfig


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class TrainingConfig(Section):
    seed: int = Field(default=0, ge=0)
    """Seed of the initial weights and of the order of the samples."""
    initial_weights: str | None = None
    """A Hugging Face folder to start from (continued pretraining) instead of random weights."""
    global_batch_tokens: int = Field(ge=1)
    """Tokens per optimizer step over all ranks; a multiple of the data's sequence length."""
    micro_batch_samples: int = Field(default=1, ge=1)
    """Rows per rank and forward pass when the DeepSpeed JSON says "auto"."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after this many optimizer steps."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Stop after this many tokens (rounded up to whole steps)."""
    max_hours: float | None = Field(default=None, gt=0)
    """Stop after this much wall time of this launch, with a checkpoint; the next launch continues."""
    z_loss_weight: float = Field(default=0.0, ge=0)
    """Weight of the mean squared log-partition added to the loss (PaLM, section 5)."""
    activation_checkpointing: bool = False
    """Recompute each block's activations in the backward pass: less memory, about a third more work."""
    compile: bool = False
    """torch.compile each block, attention excepted: a minute or more at the start, then less memory traffic on GPUs."""
    max_consecutive_skipped_steps: int = Field(default=10, ge=1)
    """Give up after this many steps in a row whose loss or gradient was not finite."""

    @model_validator(mode="after")
    def _has_a_length(self):
        if (self.max_steps is None) == (self.max_tokens is None):
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


class Recipe(Section):
    model: ModelConfig
    training: TrainingConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    data: DataConfig = DataConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: MetricsConfig = MetricsConfig()


def add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    """Add one `--section.key` flag per recipe field, its help being the text under the field."""
    group = parser.add_argument_group("recipe keys", "override the recipe file; values are YAML")
    for section, field in Recipe.model_fields.items():
        for key, leaf in field.annotation.model_fields.items():
            default = "required" if leaf.is_required() else f"default: {leaf.get_default(call_default_factory=True)}"
            text = f"{leaf.description or ''} ({default})".replace("%", "%%")
            group.add_argument(f"--{section}.{key}", default=argparse.SUPPRESS, metavar="VALUE", help=text)


def load_recipe(path: str | Path, overrides: dict[str, str]) -> Recipe:
    """Read a recipe file and apply `{"section.key": "YAML value"}` overrides.

    `model` may hold `config_json: FILE`, a Hugging Face config.json whose values the other keys override.
    Raises ValueError listing every problem, one a line.
    """
    path = Path(path)
    tree = _read_yaml(path)
    for dotted, text in overrides.items():
        section, _, key = dotted.partition(".")
        tree.setdefault(section, {})
        if not isinstance(tree[section], dict):
            raise ValueError(f"{path}: {section} must be a mapping of keys to values")
        tree[section][key] = _yaml_value(text, f"--{dotted}")
    if isinstance(tree.get("model"), dict) and "config_json" in tree["model"]:
        tree["model"] = _merge_config_json(path, tree["model"])
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise ValueError("\n".join(_sentence(path, overrides, problem) for problem in error.errors())) from None


def _merge_config_json(recipe: Path, section: dict[str, Any]) -> dict[str, Any]:
    section = dict(section)
    file = Path(str(section.pop("config_json")))
    file = file if file.is_absolute() or file.exists() else recipe.parent / file
    if not file.is_file():
        raise ValueError(f"{recipe}: model.config_json: {file} does not exist")
    return {**ModelConfig.from_hf(file).model_dump(exclude_unset=True), **section}


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML as everybody means it: a repeated key is an error and `3e-4` is a number."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ValueError(f"{node.start_mark.name}:{key_node.start_mark.line + 1}: key {key!r} is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:
            tree = yaml.load(file, _UniqueKeyLoader)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such recipe file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    except (yaml.YAMLError, RecursionError, TypeError) as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: a recipe is a mapping of sections (model, training, ...), not {type(tree).__name__}")
    return tree


def _yaml_value(text: str, flag: str) -> Any:
    try:
        return yaml.load(text, _UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{flag}: {text!r} is not valid YAML: {' '.join(str(error).split())}") from None


def _sentence(path: Path, overrides: dict[str, str], problem: dict[str, Any]) -> str:
    location = [str(part) for part in problem["loc"]]
    dotted = ".".join(location)
    where = f"--{dotted}" if dotted in overrides else f"{path}: {dotted}"
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key{did_you_mean(location[-1], _known_keys(location[:-1]))}"
    if problem["type"] == "missing":
        return f"{path}: {dotted} is required"
    message = problem["msg"].removeprefix("Value error, ")
    if not location or problem["type"] == "value_error":
        return f"{where}: {message}".replace(": : ", ": ")
    return f"{where}: {message[0].lower()}{message[1:]}, got {problem['input']!r}"


def _known_keys(parents: list[str]) -> list[str]:
    if not parents:
        return list(Recipe.model_fields)
    field = Recipe.model_fields.get(parents[0])
    extra = ["config_json"] if parents[0] == "model" else []
    return [*field.annotation.model_fields, *extra] if field and len(parents) == 1 else []


def did_you_mean(key: str, known: list[str]) -> str:
    """`; did you mean 'x'?` for the nearest of the known names, else a list of them, else nothing."""
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"; did you mean {nearest[0]!r}?" if nearest else (f"; known: {', '.join(sorted(known))}" if known else "")
