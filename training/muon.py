"""Muon and NorMuon for matrices that several ranks hold in pieces.

The momentum of every element is its own, and stays where the element is. To be made orthogonal a matrix has to be whole: each
is sent to one rank, in turn, which sends the pieces of the result back. So every rank computes as many matrices as any
other, and has one whole one at a time. AdamW takes all other parameters.

Muon: Jordan et al. 2024, Muon: an optimizer for hidden layers in neural networks. NorMuon: Li et al. 2025, arXiv 2510.05491.

Legend: R rows and C columns of a matrix, n ranks of the group that holds it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic whose five steps bring all singular values near 1 (Jordan et al. 2024)."""
STEPS = 5


class Piece(NamedTuple):
    """Elements first .. first + numel - 1 of one part of a matrix, which is one of `parts` along `dimension`."""

    part: int
    first: int
    numel: int


class Matrix(NamedTuple):
    """A matrix [R, C] and where it is."""

    shape: tuple[int, int]
    dimension: int
    """Along which tensor parallelism divides it into parts."""
    parts: int
    pieces: Sequence[Piece]
    """Of every rank of the group; together they are the matrix once."""
    holder: Tensor
    """The optimizer's tensor that has this rank's piece: the parameter itself or a flat vector."""
    offset: int
    """Where in the holder the piece begins."""


class Decayed(NamedTuple):
    """Elements of one of the optimizer's tensors, and their weight decay."""

    holder: Tensor
    elements: slice
    weight_decay: float


def orthogonalized(update: Tensor) -> Tensor:
    """The nearest matrix whose singular values are all about 1: [R, C] -> [R, C], by Newton-Schulz iteration.

    In bfloat16 on accelerators, which is what it was tuned for, in float32 on CPUs.
    """
    a, b, c = COEFFICIENTS
    wide = torch.promote_types(update.dtype, torch.float32)
    x = update.to(wide if update.device.type == "cpu" else torch.bfloat16)
    x = x.T if (tall := x.shape[0] > x.shape[1]) else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(update.dtype)


def adjusted_rate(lr: float, shape: tuple[int, int]) -> float:
    """With which updates are about as large as AdamW's (Liu et al. 2025, Muon is scalable, section 2.2)."""
    return lr * 0.2 * max(shape) ** 0.5


class Exchange:
    """Brings pieces of matrices together, one matrix to each rank of a group at a time, and back."""

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device | None = None) -> None:
        """`group` None: every matrix is whole here. `device`: where it exchanges and computes, if not where things are."""
        self.group, self.device = group, device
        self.rank, self.ranks = (0, 1) if group is None else (dist.get_rank(group), group.size())

    def together(self, matrices: Sequence[Matrix], ours: Sequence[Tensor]) -> Tensor | None:
        """`ours`: this rank's pieces of at most n matrices. Returns the one that falls to this rank, [R, C], if any."""
        mine = matrices[self.rank] if self.rank < len(matrices) else None
        received = self._all_to_all(ours, [piece.numel for piece in mine.pieces] if mine else [0] * self.ranks)
        if mine is None:
            return None
        shapes = [
            part.shape for part in torch.empty(mine.shape, device="meta").tensor_split(mine.parts, mine.dimension)
        ]
        parts = [received[0].new_empty(shape.numel()) for shape in shapes]
        for piece, values in zip(mine.pieces, received, strict=True):
            parts[piece.part][piece.first : piece.first + piece.numel] = values
        return torch.cat([part.view(shape) for part, shape in zip(parts, shapes, strict=True)], mine.dimension)

    def apart(self, matrices: Sequence[Matrix], whole: Tensor | None, like: Tensor) -> list[Tensor]:
        """The reverse: this rank's piece of each of the matrices, of the dtype and on the device of `like`."""
        sent = [like.new_empty(0)] * self.ranks
        if whole is not None:
            mine = matrices[self.rank]
            parts = [part.reshape(-1) for part in whole.tensor_split(mine.parts, mine.dimension)]
            sent = [parts[piece.part][piece.first : piece.first + piece.numel] for piece in mine.pieces]
        sizes = [matrix.pieces[self.rank].numel for matrix in matrices]
        return self._all_to_all(sent, sizes + [0] * (self.ranks - len(sizes)))[: len(matrices)]

    def _all_to_all(self, sent: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """`sent`: to each of the first ranks. Returns a vector of these sizes from each rank."""
        if self.group is None:
            return list(sent)
        lengths = [len(vector) for vector in sent] + [0] * (self.ranks - len(sent))
        given = torch.cat(list(sent)).to(self.device)
        received = given.new_empty(sum(sizes))
        dist.all_to_all_single(received, given, list(sizes), lengths, group=self.group)
        return list(received.split(list(sizes)))


class Muon(torch.optim.Optimizer):
    """Muon or NorMuon for the group named "muon", AdamW for the others, with one state.

    The parameters may be whole, or what ZeRO makes of them: then `place` has to be called before the first step.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        momentum: float,
        normalize: bool = False,
    ) -> None:
        """`normalize`: the rows of an update to one size, by the mean of their squares over time (NorMuon)."""
        self.momentum, self.normalize, self.row_decay = momentum, normalize, betas[1]
        matrices, others = ([g for g in groups if (g["name"] == "muon") is chosen] for chosen in (True, False))
        self.adamw = torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps, fused=True)
        super().__init__([*matrices, *self.adamw.param_groups], {"lr": lr})
        self.exchange = Exchange(None)
        self.find: Callable[[], list[Matrix]] = self._all_whole
        self.decayed: Callable[[], list[Decayed]] = list

    def place(
        self, exchange: Exchange, find: Callable[[], list[Matrix]], decayed: Callable[[], list[Decayed]] = list
    ) -> None:
        """`exchange`: over the ranks that hold the matrices; `find` says how, in the same order on all of them; `decayed`:
        what decays of other parameters although their group does not."""
        self.exchange, self.find, self.decayed = exchange, find, decayed

    def _all_whole(self) -> list[Matrix]:
        holders = [p for group in self.param_groups if group["name"] == "muon" for p in group["params"]]
        return [Matrix((p.shape[0], p.shape[1]), 0, 1, [Piece(0, 0, p.numel())], p, 0) for p in holders]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nobody has one
        """Of the groups that are there: ZeRO steps one after the other."""
        others = [group for group in self.param_groups if group["name"] != "muon"]
        for group in self.param_groups:
            if group["name"] == "muon":
                self._step(group)
        rates = {id(p): group["lr"] for group in others for p in group["params"]}
        for holder, elements, rate in self.decayed():
            if id(holder) in rates and holder.grad is not None:
                holder.data.view(-1)[elements].mul_(1 - rates[id(holder)] * rate)
        self.adamw.state, self.adamw.param_groups = self.state, others  # loading a checkpoint replaces these objects
        self.adamw.step()

    def _step(self, group: dict[str, Any]) -> None:
        updates: dict[int, Tensor] = {}
        for holder in (p for p in group["params"] if p.grad is not None):
            state = self.state[holder]
            for key in ("momentum_buffer", "row_mean_square")[: 1 + self.normalize]:
                if key not in state:
                    state[key] = torch.zeros_like(holder)
            state["step"] = state.get("step", torch.tensor(0.0)) + 1  # of torch's Muon older checkpoints have none
            average = state["momentum_buffer"].lerp_(holder.grad, 1 - self.momentum)
            updates[id(holder)] = holder.grad.lerp(average, self.momentum).view(-1)
            holder.mul_(1 - group["lr"] * group["weight_decay"])
        matrices = [matrix for matrix in self.find() if id(matrix.holder) in updates]
        for first in range(0, len(matrices), self.exchange.ranks):
            some = matrices[first : first + self.exchange.ranks]
            self._turn(some, [self._piece(matrix, updates[id(matrix.holder)]) for matrix in some], group["lr"])

    def _turn(self, matrices: list[Matrix], updates: list[Tensor], lr: float) -> None:
        """One matrix on each rank."""
        whole = self.exchange.together(matrices, updates)
        whole = None if whole is None else orthogonalized(whole)
        if self.normalize:
            squares = [self._piece(m, self.state[m.holder]["row_mean_square"].view(-1)) for m in matrices]
            average = self.exchange.together(matrices, squares)
            if whole is not None and average is not None:
                average.lerp_(whole.square().mean(1, keepdim=True).expand_as(average), 1 - self.row_decay)
                whole = whole / (average.sqrt() + 1e-8)
                whole *= whole[0].numel() ** 0.5 * len(whole) ** 0.5 / whole.norm() / max(whole.shape) ** 0.5
            for square, value in zip(squares, self.exchange.apart(matrices, average, updates[0]), strict=True):
                square.copy_(value)
        for matrix, value in zip(matrices, self.exchange.apart(matrices, whole, updates[0]), strict=True):
            ours = self._piece(matrix, matrix.holder.data.view(-1))
            ours.add_(value.to(ours.device), alpha=-adjusted_rate(lr, matrix.shape))

    def _piece(self, matrix: Matrix, flat: Tensor) -> Tensor:
        return flat[matrix.offset :][: matrix.pieces[self.exchange.rank].numel]
