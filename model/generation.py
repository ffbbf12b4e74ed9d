"""Text generation, one token at a time, with cached keys and values. Legend: T tokens so far, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from .attention import KeyValueCache
from .documents import Documents
from .llama import Llama
from .loss import linear_cross_entropy
from .rope import frequencies_of_length


def generate(
    model: Llama,
    input_ids: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | Collection[int] | None = None,
    generator: torch.Generator | None = None,
    one_member: bool = False,
) -> Iterator[int]:
    """Yield the continuation of one prompt, token by token.

    `input_ids`: int64 [T] or [1, T], not empty. `temperature` 0 is greedy. Of the vocabulary, the `top_k` most likely
    tokens stay, then the fewest whose probabilities sum to at least `top_p` (Holtzman et al. 2020). Ends after
    `max_new_tokens`, or with an end token, which is yielded too. `one_member`: see `MemberDecoder`. Raises ValueError for values
    out of range, and for more tokens than there are learned positions.
    """
    prompt = input_ids.reshape(1, -1)
    if prompt.shape[1] == 0 or len(prompt.flatten()) != input_ids.shape[-1]:
        raise ValueError(f"generation takes one prompt of at least one token, not a tensor of shape {input_ids.shape}")
    check_request(model, prompt.shape[1], max_new_tokens, temperature, top_k, top_p)
    stop, capacity = {eos_id} if isinstance(eos_id, int) else set(eos_id or ()), prompt.shape[1] + max_new_tokens
    decoder = MemberDecoder(model, capacity, generator) if one_member else _decoder(model, capacity)
    return _decode(
        decoder, prompt, max_new_tokens, stop, lambda logits: sample(logits, temperature, top_k, top_p, generator)
    )


def check_request(
    model: Llama, prompt_tokens: int, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    """ValueError for choices out of range, and for more tokens than there are learned positions."""
    if not temperature >= 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError("generation needs temperature >= 0, top_k >= 1 and 0 < top_p <= 1")
    longest = model.config.max_position_embeddings
    read = prompt_tokens + max_new_tokens - model.config.is_causal  # the last next token is not read again
    if model.config.position_embedding == "learned" and read > longest:
        raise ValueError(
            f"generation of {max_new_tokens} tokens after a prompt of {prompt_tokens} goes beyond the model's {longest} "
            "learned positions (max_position_embeddings): ask for fewer, or shorten the prompt"
        )


def continuation_losses(model: Llama, prompt: Tensor, continuations: Sequence[Sequence[int]]) -> list[float]:
    """Summed cross-entropy, in nats, of each continuation after one prompt, which is run through the model once.

    `prompt`: int64 [T], not empty. Continuations: token ids.
    """
    decoder = _decoder(model, len(prompt) + max(map(len, continuations)))
    first = decoder.logits(prompt.unsqueeze(0))
    losses = []
    for continuation in continuations:
        ids, logits, loss = prompt.unsqueeze(0), first, 0.0
        for place, token in enumerate(continuation):
            if place:
                logits = decoder.logits(ids)
            loss -= float(logits.double().log_softmax(-1)[token])
            ids = torch.cat([ids, ids.new_tensor([[token]])], dim=1)
        losses.append(loss)
    return losses


def _decode(
    decoder: Decoder | MemberDecoder,
    prompt: Tensor,
    max_new_tokens: int,
    stop: Collection[int],
    choose: Callable[[Tensor], int],
) -> Iterator[int]:
    ids = prompt
    for _ in range(max_new_tokens):
        token = choose(decoder.logits(ids))
        yield token
        if token in stop:
            return
        ids = torch.cat([ids, ids.new_tensor([[token]])], dim=1)


class Decoder:
    """Logits after a text that grows, or goes back and grows differently."""

    def __init__(self, model: Llama, capacity_tokens: int, adapter: int | None = None) -> None:
        """`adapter`: the place of one in the model's names; None: its mixture, or the model has none."""
        self.model, self.capacity_tokens = model, capacity_tokens
        self.routing = None if adapter is None else torch.tensor([adapter])
        self.caches: list[KeyValueCache] = []
        self.tokens = 0
        self.frequencies: tuple[float, ...] | None = None

    @torch.inference_mode()
    def logits(self, ids: Tensor) -> Tensor:
        """[V] after `ids` [1, T], of which those that were there before, but for the last, are as they were."""
        return self.model.lm_head(self.hidden(ids)[:, -1:])[0, 0]

    def hidden(self, ids: Tensor) -> Tensor:
        """What the head sees of the tokens of `ids` that are new, or of all: [1, T or 1, D], of a mixture [N, T or 1, D]."""
        tokens = ids.shape[1]
        frequencies = frequencies_of_length(self.model.config, tokens)
        if frequencies != self.frequencies:
            self.frequencies, self.tokens = frequencies, 0
            self.caches = [KeyValueCache(self.capacity_tokens) for _ in self.model.layers]
        seen, self.tokens = min(self.tokens, tokens - 1), tokens
        for cache in self.caches:
            cache.tokens = seen
        return self._pass(ids[:, seen:], tokens)

    def _pass(self, step: Tensor, tokens: int) -> Tensor:
        """The new tokens `step` [1, new] of a document that is now `tokens` long."""
        documents = Documents.stretch(tokens - step.shape[1], tokens, tokens, step.device)
        documents.route(self.routing, self.model.config.adapters.members)
        x = self.model.embed(step, documents)
        for block, cache in zip(self.model.layers, self.caches, strict=True):
            x = block(x, documents, cache)
        return self.model.norm(x)


class MixtureDecoder(Decoder):
    """Log-probabilities of the mixture of all adapters, whose weights the text so far has earned (see model/mixture.py)."""

    def __init__(self, model: Llama, capacity_tokens: int) -> None:
        super().__init__(model, capacity_tokens)
        adapters = model.config.adapters
        self.log_prior, self.evidence = torch.tensor(adapters.prior_shares).double().log(), adapters.evidence
        self.known: dict[int, tuple[Tensor, Tensor]] = {}
        """After so many tokens, the first and the last: what the members have earned [N], and their log-probabilities [N, V]."""

    @torch.inference_mode()
    def logits(self, ids: Tensor) -> Tensor:
        hidden, tokens = self.hidden(ids), ids.shape[1]
        if hidden.shape[1] == tokens:
            targets = ids[:, 1:].expand(len(hidden), -1)
            losses = linear_cross_entropy(hidden[:, :-1], self.model.lm_head.weight, targets)[1].double().cpu()
            earned = -(losses * self.evidence ** torch.arange(tokens - 1, 0, -1)).sum(1)
            self.known = {}
        else:
            before, of_members = self.known[tokens - 1]
            earned = self.evidence * (before + of_members[:, ids[0, -1]])
        of_members = self.model.lm_head(hidden[:, -1:])[:, 0].double().cpu().log_softmax(-1)
        first = min(self.known, default=tokens)
        self.known = {length: state for length, state in self.known.items() if length == first}
        self.known[tokens] = earned, of_members
        return (self._log_weights(tokens)[:, None] + of_members).logsumexp(0)

    def weights(self, ids: Tensor) -> Tensor:
        """Of the members after `ids` [1, T], [N]."""
        self.logits(ids)
        return self._log_weights(ids.shape[1]).exp()

    def _log_weights(self, tokens: int) -> Tensor:
        return (self.log_prior + self.known[tokens][0]).log_softmax(0)


class MemberDecoder:
    """Logits of one adapter of a mixture, drawn by the weights: a token that is drawn by them has the mixture's distribution.

    Where all evidence is kept, the adapter that was drawn after the prompt may stay, since p(text) = sum_i w_i p_i(text). Where
    none is, it is drawn anew for each token, and reads what it has not seen yet at once. Between them all adapters would have to
    judge each token, which saves nothing: ValueError.
    """

    def __init__(self, model: Llama, capacity_tokens: int, generator: torch.Generator | None = None) -> None:
        adapters = model.config.adapters
        if not adapters.members or adapters.evidence not in (0, 1):
            raise ValueError(
                "one member can be drawn from a mixture of adapters whose evidence is 0 or 1, not from "
                + (f"one of {adapters.evidence}" if adapters.members else "a model without one")
            )
        self.model, self.generator, self.weights = model, generator, torch.tensor(adapters.prior_shares)
        self.members = [Decoder(model, capacity_tokens, place) for place in range(adapters.members)]
        self.drawn: int | None = None

    def logits(self, ids: Tensor) -> Tensor:
        """[V] after `ids` [1, T], which begin as they did in earlier calls."""
        keeps = self.model.config.adapters.evidence == 1
        if self.drawn is None and keeps:
            self.weights = MixtureDecoder(self.model, ids.shape[1]).weights(ids)
        if self.drawn is None or not keeps:
            self.drawn = int(torch.multinomial(self.weights, 1, generator=self.generator))
        return self.members[self.drawn].logits(ids)


def _decoder(model: Llama, capacity_tokens: int) -> Decoder:
    return (MixtureDecoder if model.config.adapters.members else Decoder)(model, capacity_tokens)


def sample(
    logits: Tensor,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> int:
    """Choose a token from `logits` [V]; the most likely one at temperature 0."""
    if temperature == 0:
        return int(logits.argmax())
    # on the CPU in float32, so that a seed gives the same text on every device
    logits = logits.float().cpu() / temperature
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, len(logits))).values[-1], -torch.inf)
    probabilities = logits.softmax(-1)
    if top_p is not None:
        ordered, index = probabilities.sort(descending=True, stable=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p
        probabilities[index[beyond]] = 0.0
    return int(torch.multinomial(probabilities, 1, generator=generator))
