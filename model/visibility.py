"""Which tokens a token attends to: one definition, which every kernel follows and every test of one is made from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Tokens(NamedTuple):
    """What visibility depends on, for tokens of the flattened rows; tensors of one shape."""

    document: Tensor
    """int64, number of the document in the batch; both copies of a document (see `noised`) have the same."""
    position: Tensor
    """int64, place in the document as far as the row holds it, from 0."""
    noised: Tensor
    """bool, whether the token belongs to the noised copy of a row that holds a noised and a clean one."""

    def at(self, index: slice | Tensor | tuple) -> Tokens:
        """Some of them, or all in another shape, as indexing a tensor gives."""
        return Tokens(*(column[index] for column in self))


class Visibility(NamedTuple):
    """Documents are cut into chunks of `span` tokens; a token sees its own chunk and all earlier ones.

    With chunks of one token that is the causal mask, with chunks of a whole document (`span` None) the bidirectional
    one, between them block-causal attention. `window`: only the latest tokens, itself included.

    In rows that hold two copies of their documents, clean tokens see clean tokens as above, and noised tokens see the
    noised tokens of their own chunk and the clean ones of earlier chunks (Arriola et al. 2025, Block Diffusion, 3.2).
    """

    span: int | None = 1
    window: int | None = None

    def sees(self, query: Tokens, key: Tokens) -> Tensor:
        """Whether each query attends to each key: bool, of the shape that the two broadcast to."""
        visible = query.document == key.document
        if self.span is None:
            of_query, of_key = query.position * 0, key.position * 0
        else:
            of_query, of_key = query.position // self.span, key.position // self.span
        earlier, own = of_key < of_query, of_key == of_query
        visible = visible & (earlier & ~key.noised | own & (query.noised == key.noised))
        if self.window is not None:
            visible = visible & (query.position - key.position < self.window)
        return visible

    def keys(self, position: Any, tokens: Any) -> Any:
        """How many keys the token at `position` of a document of `tokens` sees (numbers or arrays of them)."""
        if self.span is None:
            return tokens + 0 * position
        top = (position // self.span + 1) * self.span
        seen = (top <= tokens) * top + (top > tokens) * tokens
        if self.window is None:
            return seen
        return (seen < self.window) * seen + (seen >= self.window) * self.window

    def pairs(self, tokens: Any) -> Any:
        """How many (query, key) pairs are visible in a document of `tokens` (a number or an array of them)."""
        n, c = tokens, self.span
        if self.window is not None:
            w = (n < self.window) * n + (n >= self.window) * self.window  # the shorter of the two
            return w * (w + 1) // 2 + (n - w) * w
        if c is None:
            return n * n
        full, rest = n // c, n % c
        own = full * c * c + rest * rest
        before = c * c * (full * (full - 1) // 2) + rest * full * c
        return own + before
