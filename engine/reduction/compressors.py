"""Two ways to average matrices over ranks with fewer bytes, each leaving out something and saying what.

Both take `vectors`, by name this rank's gradients with its residuals already added, and yield for each name what of it
was sent (`sent`) and what all ranks sent on average (`mean`); `vectors - sent` is the residual of the next step. The mean
is the same to the bit on all ranks: by construction with `OneBit`, and with `PowerSGD` because ranks of one kind of device
compute the same from the same averages. Nothing is kept of a call whose result is not finite: it returns None on all ranks,
and the next call finds everything as before.

    R rows  C columns of a gradient as a matrix [R, C]  r rank  n ranks  K blocks of all gradients together
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

Named = Mapping[str, torch.Tensor]
Average = Callable[[list[torch.Tensor]], None]
"""Replaces each of these tensors by its mean over all ranks."""


class Reduced(NamedTuple):
    name: str
    sent: torch.Tensor
    mean: torch.Tensor


class PowerSGD:
    """Rank-r approximation by one step of power iteration from the last one's result (Vogels et al. 2019, algorithm 1).

    With P = mean of M Q, orthonormalised, and Q = mean of M^T P, the mean gradient becomes P Q^T. A rank's residual is what
    P times its own M^T P leaves out: deviations between ranks then shrink like everything else, where a residual taken
    against the mean's P Q^T would let them add up. Two calls a step, both all-reduces: all P's together with the gradients that
    are not compressed, then all Q's.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.q: dict[str, torch.Tensor] = {}
        """By name [C, r], the same on all ranks."""

    def saves(self, shape: torch.Size) -> bool:
        """Whether P and Q together have at most half as many elements as the matrix."""
        rows, columns = shape[0], prod(shape[1:])
        return 2 * self.rank * (rows + columns) <= rows * columns

    def reduce(self, vectors: Named, plain: list[torch.Tensor], average: Average) -> Iterator[Reduced] | None:
        matrices = {name: vector.flatten(1) for name, vector in vectors.items()}
        p = {name: matrix @ self._start(name, matrix) for name, matrix in matrices.items()}  # [R, r]
        average([*plain, *p.values()])
        if not all_finite([*plain, *p.values()]):
            return None
        p = _orthonormal(p)
        own = {name: matrix.T @ p[name] for name, matrix in matrices.items()}  # [C, r]
        q = {name: factor.clone() for name, factor in own.items()}
        average(list(q.values()))
        if not all_finite([*plain, *q.values()]):
            return None
        self.q = q
        return (Reduced(name, p[name] @ own[name].T, p[name] @ q[name].T) for name in matrices)

    def state(self) -> dict[str, Any]:
        return {"q": self.q}

    def load(self, state: dict[str, Any], same_layout: bool) -> None:
        """The Q's are common to all ranks and serve any number of them, as long as the rank is the same."""
        self.q = {name: q for name, q in state.get("q", {}).items() if q.shape[1] == self.rank}

    def _start(self, name: str, matrix: torch.Tensor) -> torch.Tensor:
        """Directions [C, r] of unit length, so that P is of the gradient's size, whatever width it is sent at."""
        if name in self.q:
            return torch.nn.functional.normalize(self.q[name], dim=0)
        generator = torch.Generator().manual_seed(matrix.shape[1])
        start = torch.randn(matrix.shape[1], self.rank, generator=generator)
        return torch.nn.functional.normalize(start, dim=0).to(matrix)


def _orthonormal(factors: Named) -> dict[str, torch.Tensor]:
    """Orthonormal columns that span at least those of each factor [R, r]; factors of one shape in one call."""
    alike = defaultdict(list)
    for name, factor in factors.items():
        alike[factor.shape].append(name)
    result: dict[str, torch.Tensor] = {}
    for names in alike.values():
        bases = torch.linalg.qr(torch.stack([factors[name] for name in names])).Q
        result |= dict(zip(names, bases.unbind(), strict=True))
    return result


class OneBit:
    """Signs, each block of a gradient scaled by its mean absolute value, in both directions, with residuals in both.

    The scaled sign of Karimireddy et al. 2019 on blocks (Zheng et al. 2019), exchanged in the two stages of 1-bit Adam's
    compressed all-reduce (Tang et al. 2021): rank k averages the k-th share of the blocks as all ranks sent it and sends
    that on, compressed again. One stage, in which all send everything to all, would be simpler, but its bytes grow with
    the number of ranks; this way 1 + 32 / 1024 bits an element travel twice, as an all-reduce's 32 do.
    """

    BLOCK = 1024
    """Elements with a scale of their own; a block never holds elements of two gradients."""

    def __init__(self) -> None:
        self.held_back: torch.Tensor | None = None
        """[K / n, BLOCK]: what this rank's share of the averages had over what was sent on of it."""

    def saves(self, shape: torch.Size) -> bool:
        return True

    def reduce(self, vectors: Named, plain: list[torch.Tensor], average: Average) -> Iterator[Reduced] | None:
        ranks, shapes = dist.get_world_size(), {name: vector.shape for name, vector in vectors.items()}
        average(plain)
        blocks, filled = _blocks(vectors, self.BLOCK, ranks)  # [K, BLOCK], [K]
        message = encode(blocks, filled)  # [K, BLOCK / 8 + 4]
        received = torch.empty_like(message)
        dist.all_to_all_single(received, message)
        share = filled.chunk(ranks)[dist.get_rank()]
        total = sum((decode(part, share) for part in received.chunk(ranks)), torch.zeros(())) / ranks
        if self.held_back is not None:
            total += self.held_back
        answer = encode(total, share)
        answers = torch.empty_like(message)
        dist.all_gather_single(answers, answer)
        mean = decode(answers, filled)
        if not all_finite([*plain, mean]):
            return None
        self.held_back = total - decode(answer, share)
        both = tensors_of(decode(message, filled), shapes), tensors_of(mean, shapes)
        return (Reduced(name, both[0][name], both[1][name]) for name in shapes)

    def state(self) -> dict[str, Any]:
        return {"held_back": self.held_back}

    def load(self, state: dict[str, Any], same_layout: bool) -> None:
        """In another layout the shares are others; `engine.reduction.compression` then puts them into the residuals."""
        self.held_back = state.get("held_back") if same_layout else None


def all_finite(tensors: Sequence[torch.Tensor]) -> bool:
    """By the norm of all of them, which is also what the optimizer judges by."""
    return bool(torch.isfinite(torch.nn.utils.get_total_norm(tensors)))


def tensors_of(blocks: torch.Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
    """The gradients of these shapes again, as views of the blocks [K, BLOCK] into which they were put in this order."""
    flat, size, first, result = blocks.flatten(), blocks.shape[1], 0, {}
    for name, shape in shapes.items():
        result[name] = flat[first : first + prod(shape)].view(shape)
        first += -(-prod(shape) // size) * size
    return result


def _blocks(vectors: Named, size: int, ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All elements in zero-padded rows [K, size], each gradient from a new row on, and how many each row holds [K]."""
    like, shapes = next(iter(vectors.values())), {name: vector.shape for name, vector in vectors.items()}
    rows = sum(-(-vector.numel() // size) for vector in vectors.values())
    blocks = like.new_zeros(rows + -rows % ranks, size)
    filled = torch.full((len(blocks),), size, device=like.device)
    filled[rows:] = 0
    last = -1
    for vector, place in zip(vectors.values(), tensors_of(blocks, shapes).values(), strict=True):
        place.copy_(vector)
        last += -(-vector.numel() // size)
        filled[last] = vector.numel() - (vector.numel() - 1) // size * size
    return blocks, filled


def encode(blocks: torch.Tensor, filled: torch.Tensor) -> torch.Tensor:
    """Rows [K, BLOCK] as bytes [K, BLOCK / 8 + 4]: a sign a bit (1: minus), then the mean absolute value as float32."""
    scales = blocks.abs().sum(1, keepdim=True) / filled.clamp(min=1).unsqueeze(1)
    eight = torch.signbit(blocks).view(torch.int64)  # bytes of 0 or 1, which the product shifts into its highest byte
    packed = (eight * 0x0102040810204080 >> 56 & 255).to(torch.uint8)
    return torch.cat([packed, scales.float().view(torch.uint8)], dim=1)


def decode(message: torch.Tensor, filled: torch.Tensor) -> torch.Tensor:
    """What `encode` kept of the rows [K, BLOCK]: the scale with the element's sign; zero where a row is not filled."""
    bytes_, bits = (torch.arange(n, device=message.device) for n in (256, 8))
    signs = 1.0 - 2.0 * (bytes_.unsqueeze(1) >> bits & 1)  # [256, 8]
    values = signs.index_select(0, message[:, :-4].flatten().int()).view(len(message), -1)
    values *= message[:, -4:].contiguous().view(torch.float32)
    places = torch.arange(values.shape[1], device=values.device)
    return values.masked_fill_(places >= filled.unsqueeze(1), 0.0)


def merged(states: Iterable[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The mean of all ranks' residuals, by name, with what the ranks held back of their shares."""
    states = list(states)
    total = {name: residual.clone() for name, residual in states[0]["residuals"].items()}
    for name, residual in total.items():
        for other in states[1:]:
            residual += other["residuals"][name]
        residual /= len(states)
    shares = [state["compressor"].get("held_back") for state in states]
    if total and shares[0] is not None:
        for name, share in tensors_of(torch.cat(shares), {name: r.shape for name, r in total.items()}).items():
            total[name] += share
    return total
