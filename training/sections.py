"""The sections of a recipe whose code needs torch: they are read, and explained by --help, without it."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

Rate = Annotated[float, Field(ge=0, lt=1)]


class DataConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    weights: dict[str, float] | None = None
    """Share of the samples per source, relative to each other; none: the weights that the data were built with."""
    num_workers: int = Field(default=0, ge=0)
    """Processes that read ahead; reading takes microseconds a row, so they pay only on storage with high latency."""
    prefetch_batches: int = Field(default=4, ge=1)
    """Micro-batches that each worker reads ahead."""
    balance_attention: bool = True
    """Deal the rows of a step out to the ranks by their attention cost (longer documents cost more) instead of in order."""


class ObjectiveConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True, allow_inf_nan=False)

    name: Literal["causal", "masked", "block_diffusion", "contrastive"] = "causal"
    """causal: predict the next token. masked: predict tokens replaced by the mask token, from both sides (with `attention:
    chunked` from their own and earlier chunks). block_diffusion: predict the masked tokens of each chunk from the rest of
    it and the clean earlier chunks; a row then holds both copies (Arriola et al. 2025). contrastive: of the conversations in a
    step, find what answers each question by the mean of its last hidden states (InfoNCE, van den Oord et al. 2018); for
    semantic search."""

    temperature: PositiveFloat | None = None
    """Of contrastive: what cosines are divided by; null: 0.05."""

    mask_ratio: float | tuple[float, float] | None = None
    """Share of the tokens that is masked. One number: fixed, the loss is the mean over the masked tokens (Devlin et al.
    2019). Two: drawn uniformly between them for each row, or chunk of block_diffusion, and a masked token weighs 1 over
    the share; with [0, 1] the loss bounds -log p of a token from above (Sahoo et al. 2024, MDLM, equation 10). null: 0.15
    for masked, [0, 1] for block_diffusion."""

    random_ratio: float = Field(default=0.0, ge=0, le=1)
    """Share of the masked tokens that is replaced by a random token instead (0.1 in BERT); with a fixed mask_ratio."""

    keep_ratio: float = Field(default=0.0, ge=0, le=1)
    """Share of the masked tokens that is left as it is (0.1 in BERT); with a fixed mask_ratio."""

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        set_here = {key for key in ("mask_ratio", "random_ratio", "keep_ratio") if getattr(self, key)}
        if self.temperature is not None and self.name != "contrastive":
            set_here = {"temperature"}
        elif self.masks:
            set_here = set()
        if set_here:
            raise ValueError(f"{min(set_here)} has no meaning for the objective {self.name}: remove it")
        return self

    @model_validator(mode="after")
    def _masks_make_sense(self) -> Self:
        set_here = {key for key in ("mask_ratio", "random_ratio", "keep_ratio") if getattr(self, key)}
        if not self.masks:
            return self
        low, high = self.ratios
        if not 0 <= low <= high <= 1 or not high:
            raise ValueError(f"mask_ratio {self.mask_ratio}: one share in (0, 1], or two, the smaller one first")
        if self.name == "block_diffusion" and not self.drawn:
            raise ValueError("block_diffusion draws its mask_ratio: give two numbers, [0, 1] for all shares")
        if self.drawn and set_here & {"random_ratio", "keep_ratio"}:
            raise ValueError("random_ratio and keep_ratio go with a fixed mask_ratio: the bound is for masks only")
        if self.random_ratio + self.keep_ratio > 1:
            raise ValueError("random_ratio and keep_ratio are shares of the masked tokens: their sum is at most 1")
        return self

    @property
    def masks(self) -> bool:
        """Whether tokens are hidden, and the model sees both sides."""
        return self.name in ("masked", "block_diffusion")

    @property
    def ratios(self) -> tuple[float, float]:
        """The smallest and the largest share."""
        ratio = self.mask_ratio
        if ratio is None:
            ratio = 0.15 if self.name == "masked" else (0.0, 1.0)
        return ratio if isinstance(ratio, tuple) else (ratio, ratio)

    @property
    def drawn(self) -> bool:
        """Whether the share differs from row to row, or from chunk to chunk."""
        return isinstance(self.mask_ratio, tuple) or (self.mask_ratio is None and self.name == "block_diffusion")

    @property
    def bounds_likelihood(self) -> bool:
        """Whether the loss bounds -log p of a token from above."""
        return self.drawn and self.ratios == (0.0, 1.0)

    def resolved(self) -> dict[str, Any]:
        """JSON-able, with the default of `mask_ratio` filled in."""
        low, high = self.ratios
        return self.model_dump() | {"mask_ratio": [low, high] if self.drawn else high}

    @property
    def copies(self) -> int:
        """Copies of each row that the model reads: noised and clean, or one."""
        return 2 if self.name == "block_diffusion" else 1


class OptimizerConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True, allow_inf_nan=False)

    name: Literal["adamw", "lion", "muon", "normuon"] = "adamw"
    """AdamW (Loshchilov and Hutter 2019); Lion (Chen et al. 2023), half the state, a rate 3 to 10 times smaller; or Muon
    (Jordan et al. 2024) or NorMuon (Li et al. 2025) for the linear maps of the blocks, at AdamW's rate (Liu et al. 2025), and
    AdamW for the rest."""

    lr: PositiveFloat = 3e-4
    """Peak learning rate, reached at the end of warmup."""

    betas: tuple[Rate, Rate] = (0.9, 0.95)
    """Decay rates of the running means of the gradient and of its square."""

    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment; Lion has none."""

    momentum: Rate = 0.95
    """Decay rate of Muon's running mean of the gradient."""

    weight_decay: NonNegativeFloat = 0.1
    """Decoupled decay of linear maps, multiplied by the learning rate; embeddings, norms and biases have none."""

    max_grad_norm: PositiveFloat | None = 1.0
    """Gradients are scaled down to this global norm; null: never."""

    @property
    def moments(self) -> tuple[str, ...]:
        """Names of the optimizer's state tensors, each of the parameter's shape; under Muon a parameter has some of them."""
        adamw = ("exp_avg", "exp_avg_sq")
        muon = ("momentum_buffer", *adamw)
        kinds = {"adamw": adamw, "lion": ("exp_avg",), "muon": muon, "normuon": ("row_mean_square", *muon)}
        return kinds[self.name]

    @property
    def is_muon(self) -> bool:
        """Whether matrices are updated as a whole."""
        return self.name in ("muon", "normuon")


class MetricsConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)

    log_every_steps: PositiveInt = 10
    """Optimizer steps between two lines on the console, in metrics.jsonl and in W&B; the first and last step always."""

    wandb: bool = True
    """Record the run with Weights & Biases: online if a key is configured, otherwise offline under RUN/wandb."""

    wandb_project: str | None = None
    """W&B project; null: WANDB_PROJECT, or `longform`."""

    wandb_entity: str | None = None
    """W&B user or team; null: the key's default."""

    wandb_name: str | None = None
    """Display name of the run; null: the name of the output folder."""

    wandb_group: str | None = None
    """Group under which W&B shows related runs."""

    wandb_tags: tuple[str, ...] = ()
    """W&B tags of the run."""

    tensorboard: bool = False
    """Write event files for TensorBoard under RUN/tensorboard."""

    layer_statistics_every_steps: NonNegativeInt = 100
    """Optimizer steps between two records of RUN/layers.jsonl, the first step always: gradient, parameters, update, activations
    and largest attention logit of every layer; 0: none."""


class StageConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: str | None = Field(default=None, min_length=1)
    """What the stage is called in logs, and its validation set after it; null: stage-1, stage-2, ..."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps of this stage."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Tokens of this stage (rounded up to whole steps)."""
    data: str | None = None
    """Folder made by data_prep.build, with the tokenizer of the others and any --seq-length; null: --data."""
    weights: dict[str, float] | None = None
    """Share of the samples per source, as `data.weights`; null: those of `data.weights`."""
    micro_batch_samples: int | None = Field(default=None, ge=1)
    """Rows per rank and forward pass; null: `training.micro_batch_samples` in the first stage, then as many tokens as there,
    as far as the step can be divided so, and at least one row."""

    @model_validator(mode="after")
    def _has_a_length(self) -> Self:
        if (self.max_steps is None) == (self.max_tokens is None):
            raise ValueError("give exactly one of max_steps and max_tokens")
        return self

    def steps(self, step_tokens: int) -> int:
        """Its length where an optimizer step has so many tokens."""
        if self.max_steps is not None:
            return self.max_steps
        assert self.max_tokens is not None
        return -(-self.max_tokens // step_tokens)
