"""LLaMA as a masked language model for transformers. This file travels with exported models; training does not use it.

The logits at a token are those of the token itself, not of the next one. A token sees all of its row (`is_causal: false` in
config.json), or with `chunk_size` the chunk of so many tokens of its document that it lies in, and all earlier ones.

Legend: B batch, T tokens of a row.
"""

from typing import Any, NoReturn

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.utils.versions import require_version

require_version("transformers>=5.2")  # earlier ones pass over `is_causal`


def visible(position_ids: torch.Tensor, attention_mask: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """Whether each token (row) attends to each other one (column): bool [B, 1, T, T].

    `position_ids` int64 [B, T], 0 where a document starts; `attention_mask` [B, T], 0 where there is padding, which
    sees itself, so that no softmax is over nothing.
    """
    document, chunk = (position_ids == 0).cumsum(-1), position_ids // chunk_size
    seen = (document.unsqueeze(2) == document.unsqueeze(1)) & (chunk.unsqueeze(2) >= chunk.unsqueeze(1))
    itself = torch.eye(position_ids.shape[1], dtype=torch.bool, device=position_ids.device)
    return (seen & attention_mask.bool().unsqueeze(1) | itself).unsqueeze(1)


class MaskedLM:
    """What every class below adds to a causal one: its loss, which transformers chooses by the name, and this."""

    def generate(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError("this model predicts masked tokens, not the next one: its README.md says how to use it")


class ChunkedMaskedLM(MaskedLM):
    _supports_flash_attn = _supports_flex_attn = False  # neither takes a mask of this form

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits [B, T, vocab_size]; with `labels` [B, T] also their mean cross-entropy, -100 being left out.

        `attention_mask` [B, T], 0 for padding, on either side. `position_ids` [B, T] restart at 0 where a document
        starts (default: every row is one document). Other arguments as in the causal model.
        """
        if past_key_values is not None:
            raise ValueError(
                "past_key_values cannot be used: tokens of an unfinished chunk see those that follow in it"
            )
        rows = inputs_embeds if input_ids is None else input_ids
        assert rows is not None, "input_ids or inputs_embeds"
        if attention_mask is None:
            attention_mask = torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)
        if attention_mask.ndim != 2:
            raise ValueError("attention_mask must be of shape [batch, tokens]: the mask of the chunks is made here")
        if position_ids is None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        mask = visible(position_ids.expand(rows.shape[:2]), attention_mask, self.config.chunk_size)
        if self.config._attn_implementation == "eager":
            lowest = torch.finfo(self.dtype).min
            mask = torch.zeros(mask.shape, dtype=self.dtype, device=mask.device).masked_fill(~mask, lowest)
        return super().forward(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )


class LlamaForMaskedLM(MaskedLM, LlamaForCausalLM):
    pass


class Qwen3ForMaskedLM(MaskedLM, Qwen3ForCausalLM):
    pass


class ChunkedLlamaConfig(LlamaConfig):
    model_type = "chunked_llama"


class ChunkedLlamaForMaskedLM(ChunkedMaskedLM, LlamaForCausalLM):
    config_class = ChunkedLlamaConfig


class ChunkedQwen3Config(Qwen3Config):
    model_type = "chunked_qwen3"


class ChunkedQwen3ForMaskedLM(ChunkedMaskedLM, Qwen3ForCausalLM):
    config_class = ChunkedQwen3Config
