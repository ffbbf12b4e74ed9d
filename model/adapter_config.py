"""What adapters a model has, in the field names of PEFT's `LoraConfig` wherever it has one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, field_validator, model_validator

Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROJECTIONS: tuple[Projection, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NOT_HERE = ("use_dora", "bias", "modules_to_save", "init_lora_weights", "rank_pattern", "alpha_pattern")
"""Of LoraConfig: what PEFT trains otherwise than here."""
RESERVED = "base", "mixture"
"""Of `--adapter`; an export has a folder `base`."""

FACTORS = "lora_A_", "lora_B_"
"""Beginnings of the names of parameters: A [r, inputs] and B [outputs, r] of the adapter whose name follows."""


def adapter_of(parameter: str) -> str | None:
    """Which adapter a parameter of this name belongs to; None: the base."""
    leaf = parameter.rpartition(".")[2]
    return next((leaf.removeprefix(begin) for begin in FACTORS if leaf.startswith(begin)), None)


class AdaptersConfig(BaseModel):
    """Low-rank adapters (Hu et al. 2022, LoRA) on one base."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True, allow_inf_nan=False)

    names: tuple[str, ...] = ()
    """Of the adapters; none: the model is trained without. Letters, digits, - and _."""
    mode: Literal["routed", "mixture", "hard", "single"] = "routed"
    """Which rows an adapter sees. routed: those of the data's source of its name; several adapters meet in a batch, and each
    has its own mean loss, gradient norm and count of steps, as if it was trained alone. mixture: all rows; the loss is that of
    the adapters' likelihoods, mixed by `prior` and `evidence`. hard: every document's own, chosen anew at each step, by which
    it is most likely under the prior (hard EM). single: one adapter, all rows."""
    prior: dict[str, PositiveFloat] | dict[str, dict[str, PositiveFloat]] = {}
    """Of modes mixture and hard: the weight of each adapter before a document has said anything, relative to the others, or
    such weights for each source of the data; none: equal."""
    prior_lr: PositiveFloat | None = None
    """Of a mixture: the learning rate, times the schedule's factor, at which Adam learns the logarithms of the prior's
    weights; null: the prior stays as it is given."""
    evidence: float = Field(default=1.0, ge=0, le=1)
    """Of a mixture: how much of what a document has said about its adapter is kept from token to token. 1: all, so that whole
    documents are mixed; 0: nothing, every token by the prior."""
    r: PositiveInt | dict[str, PositiveInt] = 16
    """Rank of the update of a matrix; or of each adapter by its name."""
    lora_alpha: PositiveFloat | dict[str, PositiveFloat] = 32.0
    """The update is multiplied by lora_alpha / r; or of each adapter by its name."""
    use_rslora: bool = False
    """Multiply by lora_alpha / sqrt(r) instead (Kalajdzievski 2023)."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of what an adapter reads that is dropped in training."""
    target_modules: tuple[Projection, ...] = PROJECTIONS
    """Linear maps of a block that are adapted."""
    last_layers: PositiveInt | None = None
    """Only so many blocks at the end have adapters; null: all."""
    train_base: bool = False
    """Whether the base is trained too; else it is `training.initial_weights` as they are."""
    initial_weights: dict[str, str] = {}
    """Folders of PEFT's that adapters start from, by the adapters' names; the others start from nothing."""

    @model_validator(mode="before")
    @classmethod
    def _is_plain_lora(cls, tree: Any) -> Any:
        for key in NOT_HERE if isinstance(tree, dict) else ():
            if key in tree:
                raise ValueError(f"{key} is PEFT's: adapters are trained here without, so leave it out")
        return tree

    @field_validator("names")
    @classmethod
    def _names_are_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if not name.replace("-", "").replace("_", "").isalnum() or not name.isascii():
                raise ValueError(f"{name!r} is no name for an adapter: use letters, digits, - and _")
            if name in RESERVED:
                raise ValueError(f"{name!r} is no name for an adapter: commands mean something else by it")
            if names.count(name) > 1:
                raise ValueError(f"two adapters are called {name!r}: give each a name of its own")
        return names

    @field_validator("target_modules")
    @classmethod
    def _targets_something(cls, targets: tuple[Projection, ...]) -> tuple[Projection, ...]:
        if not targets:
            raise ValueError(f"name at least one of {', '.join(PROJECTIONS)}")
        return tuple(name for name in PROJECTIONS if name in targets)

    @model_validator(mode="after")
    def _is_whole(self) -> AdaptersConfig:
        if not self.names:
            if given := [key for key, field in type(self).model_fields.items() if getattr(self, key) != field.default]:
                raise ValueError(f"{given[0]} without adapters.names: name the adapters")
            return self
        if self.mode == "single" and len(self.names) > 1:
            raise ValueError(f"mode single is for one adapter, not {len(self.names)}: use routed")
        if unknown := sorted(self.initial_weights.keys() - set(self.names)):
            raise ValueError(f"initial_weights: {unknown[0]!r} is not one of the adapters {', '.join(self.names)}")
        of_mixture = self.evidence != 1 or self.prior_lr is not None
        if (self.prior and not self.members) or (of_mixture and self.mode != "mixture"):
            raise ValueError(
                f"prior, prior_lr and evidence are of mode mixture (hard has a prior too), not {self.mode}: leave them out"
            )
        by_adapter: dict[str, Any] = {"r": self.r, "lora_alpha": self.lora_alpha, "prior": self.prior or None}
        if self.prior_sources:
            by_adapter |= {"prior": None} | {f"prior.{source}": self.prior[source] for source in self.prior_sources}
        for key, given in by_adapter.items():
            if isinstance(given, dict) and given.keys() != set(self.names):
                wrong = sorted(given.keys() ^ set(self.names))[0]
                raise ValueError(f"{key} has to have a value for each of names and no other: look at {wrong!r}")
        return self

    @property
    def freeze_base(self) -> bool:
        """Whether there are adapters and nothing else is trained."""
        return bool(self.names) and not self.train_base

    @property
    def members(self) -> int:
        """Adapters that a row passes through which is not given one; 0: such a row passes through none."""
        return len(self.names) if self.mode in ("mixture", "hard") else 0

    @property
    def prior_sources(self) -> tuple[str, ...]:
        """Of the data, which have a prior each; none: there is one for all."""
        return tuple(source for source, given in self.prior.items() if isinstance(given, dict))

    @property
    def prior_table(self) -> list[list[float]]:
        """For each of `prior_sources`, or once for all: of each adapter, in the order of the names. Rows sum to 1."""
        rows: list[Any] = [self.prior[source] for source in self.prior_sources] or [self.prior]
        weights = [[row.get(name, 1.0) for name in self.names] for row in rows]
        return [[weight / sum(row) for weight in row] for row in weights]

    @property
    def prior_shares(self) -> list[float]:
        """Of each adapter, for a text of no known source: the mean over the sources."""
        return [sum(column) / len(column) for column in zip(*self.prior_table, strict=True)]

    def with_prior(self, table: Sequence[Sequence[float]]) -> AdaptersConfig:
        """The same with another `prior_table`, a learned one."""
        rows = [dict(zip(self.names, row, strict=True)) for row in table]
        prior = dict(zip(self.prior_sources, rows, strict=True)) if self.prior_sources else rows[0]
        return self.model_copy(update={"prior": prior})

    def of_mixture(self) -> dict[str, Any]:
        """Those of a mixture as data, which config.json keeps."""
        kept = self.model_dump(
            mode="json", include={"names", "evidence", "use_rslora", "target_modules", "last_layers"}
        )
        ranks = dict(zip(self.names, map(self.rank, self.names), strict=True))
        alphas = dict(zip(self.names, map(self.alpha, self.names), strict=True))
        return kept | {"r": ranks, "lora_alpha": alphas, "mode": "mixture", "prior": self.prior}

    def rank(self, name: str) -> int:
        """r of one adapter."""
        return self.r[name] if isinstance(self.r, dict) else self.r

    def alpha(self, name: str) -> float:
        """lora_alpha of one adapter."""
        return self.lora_alpha[name] if isinstance(self.lora_alpha, dict) else self.lora_alpha

    def scaling(self, name: str) -> float:
        """What the product of the two factors of one adapter is multiplied by."""
        return self.alpha(name) / (self.rank(name) ** 0.5 if self.use_rslora else self.rank(name))

    def adapted_layers(self, num_hidden_layers: int) -> range:
        """Indices of the blocks that have adapters."""
        if not self.names:
            return range(0)
        return range(max(0, num_hidden_layers - (self.last_layers or num_hidden_layers)), num_hidden_layers)
