"""The mixture of several low-rank adapters on one base, for transformers. This file travels with exported models; training does
not use it.

Every row passes the model once for each member i, an adapter, and the probability of the next token is

    p(x_t) = sum_i w_i(t) p_i(x_t),    w_i(1) = pi_i,    w_i(t + 1) proportional to (w_i(t) p_i(x_t))^g pi_i^(1 - g)

with config.json's `adapters.prior` as pi and `adapters.evidence` as g: what a text has said so far chooses its member. In
logarithms w(t) = softmax(log pi + v(t)), v(1) = 0, v(t + 1) = g (v(t) + log p(x_t)).

Legend: N members, B batch, T tokens of a row, D model, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.versions import require_version

require_version("transformers>=5.2")

LOGITS_AT_ONCE = 1 << 25
"""Of one member, while only likelihoods of tokens are wanted."""


class MixedLinear(nn.Linear):
    """A linear map of the base and what each member adds to it, for rows [N B, T, inputs], member after member."""

    def __init__(self, base: nn.Linear, adapters: dict[str, Any]) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None)
        self.scalings = {}
        for name in adapters["names"]:
            r, alpha = adapters["r"][name], adapters["lora_alpha"][name]
            self.scalings[name] = alpha / (r**0.5 if adapters["use_rslora"] else r)
            self.register_parameter(f"lora_A_{name}", nn.Parameter(torch.zeros(r, self.in_features)))
            self.register_parameter(f"lora_B_{name}", nn.Parameter(torch.zeros(self.out_features, r)))

    def forward(self, x: Tensor) -> Tensor:
        parts = x.chunk(len(self.scalings))
        added = [
            part @ getattr(self, f"lora_A_{name}").T @ getattr(self, f"lora_B_{name}").T * scaling
            for part, (name, scaling) in zip(parts, self.scalings.items(), strict=True)
        ]
        return super().forward(x) + torch.cat(added)


class MixtureCache(DynamicCache):
    """Keys and values of every member's rows, and how the members stand after the last token."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.members = len(config.adapters["names"])
        self.known: tuple[Tensor, Tensor] | None = None
        """v at the last token, float64 [N, B], and every member's log-probabilities of the token that follows, [N, B, V]."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(self._select(beam_idx))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(self._select(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.known is not None:
            earned, predictions = self.known
            self.known = earned.repeat_interleave(repeats, 1), predictions.repeat_interleave(repeats, 1)

    def reset(self) -> None:
        super().reset()
        self.known = None

    def crop(self, *_: Any, **__: Any) -> None:
        raise ValueError("a mixture of adapters cannot take tokens back: generate without an assistant")

    def _select(self, indices: Tensor) -> Any:
        """Take these rows of what is known; where they are among the rows of all members."""
        assert self.known is not None, "a cache without tokens has no rows"
        earned, predictions = self.known
        places = indices.to(earned.device)
        self.known = earned[:, places], predictions[:, places]
        return torch.cat([indices + member * earned.shape[1] for member in range(self.members)])


class MixtureLM:
    """What every class below makes of a causal one."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        adapters = config.adapters
        for layer in self.model.layers[-(adapters["last_layers"] or len(self.model.layers)) :]:
            for part in (layer.self_attn, layer.mlp):
                for name, linear in list(part.named_children()):
                    if name in adapters["target_modules"]:
                        setattr(part, name, MixedLinear(linear, adapters))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As `logits` float32 [B, T, V] logarithms of the mixed probabilities; with `labels` also their mean cross-entropy.

        `attention_mask` [B, T], 0 for padding, on either side, which says nothing of the members. Weights begin anew in every
        row, and where `position_ids` are 0 (rows of several documents are for `use_cache=False`, as in the causal model); all
        other tokens of a row have earned them, whether they are `labels` or not.
        """
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("a mixture of adapters weighs its members by tokens: give input_ids, no inputs_embeds")
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError("attention_mask must be of shape [batch, tokens]: a mixture of adapters repeats it")
        cache = self._cache(past_key_values, use_cache)
        members = len(self.config.adapters["names"])
        outputs = self.model(
            input_ids=input_ids.repeat(members, 1),
            attention_mask=None if attention_mask is None else attention_mask.repeat(members, 1),
            position_ids=None if position_ids is None else position_ids.expand(input_ids.shape).repeat(members, 1),
            past_key_values=cache,
            use_cache=cache is not None,
            **kwargs,
        )
        hidden = outputs.last_hidden_state.unflatten(0, (members, -1))
        earned = self._earned(hidden, input_ids, self._continues(input_ids, attention_mask, position_ids, cache), cache)
        log_weights = (self.log_prior(hidden.device)[:, None, None] + earned).log_softmax(0)
        if cache is not None:
            cache.known = earned[..., -1], self.lm_head(hidden[:, :, -1]).float().log_softmax(-1)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self._mixed(hidden[:, :, keep], log_weights[:, :, keep].float())
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def log_prior(self, device: torch.device) -> Tensor:
        """Float64 [N]. Where sources of the training data had a prior each, the mean of them, as for a text of no source."""
        adapters = self.config.adapters
        given = [each for each in adapters["prior"].values() if isinstance(each, dict)] or [adapters["prior"]]
        rows = torch.tensor([[row.get(name, 1.0) for name in adapters["names"]] for row in given], dtype=torch.float64)
        return (rows / rows.sum(1, keepdim=True)).mean(0).log().to(device)

    def _cache(self, given: Any, use_cache: bool | None) -> MixtureCache | None:
        """The cache that was made here before; a new one where keys and values are to be kept."""
        if isinstance(given, MixtureCache):
            return given
        if given is not None and (type(given) is not DynamicCache or given.get_seq_length()):
            raise ValueError("a mixture of adapters continues only a cache of its own, of the default (dynamic) kind")
        keep = self.config.use_cache if use_cache is None else use_cache
        return MixtureCache(self.config) if keep or given is not None else None

    def _continues(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: MixtureCache | None
    ) -> Tensor:
        """bool [B, T]: whether a token was predicted from the one before it, so that it tells of the members."""
        known = cache is not None and cache.known is not None
        continues = torch.ones_like(input_ids, dtype=torch.bool)
        continues[:, 0] = known
        if attention_mask is not None:
            seen = attention_mask.bool()[:, -input_ids.shape[1] - known :]
            continues[:, not known :] &= seen[:, 1:] & seen[:, :-1]
        if position_ids is not None:
            continues &= position_ids.expand(input_ids.shape) != 0
        return continues

    def _earned(self, hidden: Tensor, input_ids: Tensor, continues: Tensor, cache: MixtureCache | None) -> Tensor:
        """v after each token, float64 [N, B, T]: v' = f v + b, of which pairs of neighbours, of pairs, ... are made one."""
        known = None if cache is None else cache.known
        factor = continues * float(self.config.adapters["evidence"])
        total = factor * self._likelihoods(hidden, input_ids, cache).double()
        if known is not None:
            total = torch.cat([total[..., :1] + factor[:, :1].double() * known[0][..., None], total[..., 1:]], -1)
        factor, step = factor.double(), 1
        while step < input_ids.shape[1]:
            total = torch.cat([total[..., :step], total[..., step:] + factor[:, step:] * total[..., :-step]], -1)
            factor = torch.cat([factor[:, :step], factor[:, step:] * factor[:, :-step]], -1)
            step *= 2
        return total

    def _likelihoods(self, hidden: Tensor, input_ids: Tensor, cache: MixtureCache | None) -> Tensor:
        """Every member's log-probability of each token, 0 of the first token of all, float32 [N, B, T]."""
        first = torch.zeros(*hidden.shape[:2], 1, device=hidden.device)
        if cache is not None and cache.known is not None:
            first = _of_tokens(cache.known[1].unsqueeze(2), input_ids[:, :1])
        length = max(1, LOGITS_AT_ONCE // (len(input_ids) * self.config.vocab_size))
        pieces = zip(hidden[:, :, :-1].split(length, 2), input_ids[:, 1:].split(length, 1), strict=True)
        found = [
            torch.stack([_of_tokens(self.lm_head(member).float().log_softmax(-1), ids) for member in piece])
            for piece, ids in pieces
            if ids.shape[1]
        ]
        return torch.cat([first, *found], -1)

    def _mixed(self, hidden: Tensor, log_weights: Tensor) -> Tensor:
        """Logarithms of the mixed probabilities, float32 [B, T, V]."""
        weighed = (
            weight.unsqueeze(-1) + self.lm_head(member).float().log_softmax(-1)
            for member, weight in zip(hidden, log_weights, strict=True)
        )
        return functools.reduce(torch.logaddexp, weighed)


def _of_tokens(log_likelihoods: Tensor, ids: Tensor) -> Tensor:
    """[..., B, T, V] and [B, T] -> [..., B, T]."""
    return log_likelihoods.gather(-1, ids[..., None].expand(*log_likelihoods.shape[:-1], 1)).squeeze(-1)


class MixtureLlamaConfig(LlamaConfig):
    model_type = "mixture_llama"


class MixtureLlamaForCausalLM(MixtureLM, LlamaForCausalLM):
    config_class = MixtureLlamaConfig


class MixtureMistralConfig(MistralConfig):
    model_type = "mixture_mistral"


class MixtureMistralForCausalLM(MixtureLM, MistralForCausalLM):
    config_class = MixtureMistralConfig


class MixtureQwen3Config(Qwen3Config):
    model_type = "mixture_qwen3"


class MixtureQwen3ForCausalLM(MixtureLM, Qwen3ForCausalLM):
    config_class = MixtureQwen3Config
