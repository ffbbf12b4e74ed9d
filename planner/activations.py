"""What the layers of a rank hold during a step, found by running one of each kind on fake tensors.

A fake tensor has a shape, a dtype and a device but no data, so that the blocks of any model run, forward and backward, in
milliseconds and in no memory, through the very code that trains: this rank's slice of the matrices, its share of the tokens,
recomputation, adapters. `LiveBytes` counts the bytes of the tensors that live meanwhile, as `torch.distributed._tools.MemTracker`
does (a test holds the two equal).

Legend: B rows of a micro-batch, T tokens of a row, t those that are here, D model, V vocabulary, C tokens of a chunk.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

from engine.layout.mesh import Mesh
from engine.layout.tensor import Parts, divide_layer
from model import loss
from model.attention import use_products
from model.documents import Documents
from model.llama import Attention, Block, Layer, layer_plan
from model.loss import CHUNK_TOKENS, CHUNK_TOKENS_CUDA, VocabularyPart, linear_cross_entropy
from planner.exchanges import AllKeys, HeadsForTokens, flash
from planner.live_bytes import LiveBytes
from planner.shapes import fake_tensors, meta_tensors
from training.config import Recipe

Kernel = Callable[..., Tensor]


class LayerBytes(NamedTuple):
    """What a layer takes beside its parameters."""

    forward: int
    """At most while it runs, its input and output included."""
    kept: int
    """From then to its backward pass."""
    backward: int
    """At most during that, with what is kept, the gradients of its output and input and of one parameter at a time."""
    gradients: int
    """Of its parameters, all together."""
    largest: int
    """The largest of these: there are two at a time where gradients stay."""


class RowsHere(NamedTuple):
    """What a rank has of a micro-batch."""

    rows: int
    length: int
    """Of whole rows, of all copies."""
    documents: int
    """Of a row."""


class Numbers(NamedTuple):
    """In what a rank computes."""

    weights: torch.dtype
    autocast: torch.dtype | None
    device: str
    """`cpu` or `cuda`: which kernels there are."""
    products: bool = False
    """Whether a CPU attends by matrix products."""

    @property
    def tensors(self) -> contextlib.AbstractContextManager[Any]:
        """What has shapes and no values: where a GPU computes in one dtype tensors of no device, which are several times as
        fast and hold the same; fake ones where autocast or which attention a CPU chooses depend on the device."""
        return meta_tensors() if self.device == "cuda" and self.autocast is None else fake_tensors()


class Kind(NamedTuple):
    """A layer of the plan as it is, and recomputed in backward where it can be."""

    plain: LayerBytes
    again: LayerBytes


class Layers(NamedTuple):
    """What the layers of the plan take, in their order; the last norm and the head count as one."""

    kinds: list[Kind]
    shared: int
    """Bytes that all of them use, once for each micro-batch: the tables of rotary positions."""


@contextlib.contextmanager
def fake_ranks(mesh: Mesh) -> Iterator[dist.ProcessGroup | None]:
    """The group of the ranks that share the matrices, in which nobody answers; for this process alone, which has no other."""
    if mesh.tensor == 1:
        yield None
        return
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=mesh.tensor)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


class Trials:
    """What was found before, since a plan asks for the same layers again and again."""

    def __init__(self) -> None:
        self._known: dict[str, Any] = {}

    def remembered(self, key: Any, find: Callable[[], Any]) -> Any:
        """What depends on the key alone."""
        if repr(key) not in self._known:
            self._known[repr(key)] = find()
        return self._known[repr(key)]

    def layers(self, recipe: Recipe, mesh: Mesh, here: RowsHere, numbers: Numbers) -> Layers:
        """Of the whole plan, on a rank of a mesh, for one micro-batch."""
        parts = mesh._replace(rank=0, pipeline=1, world_size=mesh.tensor * mesh.sequence)
        key = recipe.model, recipe.objective, parts, here._replace(rows=0), numbers
        place = repr(key)
        if place not in self._known:
            with fake_ranks(parts) as group, numbers.tensors:
                one, two = (_Trial(recipe, parts, here._replace(rows=n), numbers, group).run() for n in (1, 2))
            self._known[place] = one, two
        one, two = self._known[place]
        pairs = [*zip(one.kinds[:-1], two.kinds[:-1], strict=True)]
        of_rows = {
            pair: Kind(*(_extended(a, b, here.rows) for a, b in zip(*pair, strict=True)))
            for pair in dict.fromkeys(pairs)
        }
        kinds = [of_rows[pair] for pair in pairs]
        members = max(1, recipe.adapters.members)
        tokens = members * here.rows * here.length // mesh.sequence
        chunk = CHUNK_TOKENS_CUDA if numbers.device == "cuda" and mesh.tensor == 1 else CHUNK_TOKENS * mesh.tensor
        chunks = 1 if tokens <= chunk else 2
        alone = parts._replace(world_size=mesh.tensor, sequence=1, exchange="heads")

        def find() -> tuple[int, list[LayerBytes]]:
            with fake_ranks(alone) as group, numbers.tensors:
                return _Trial(recipe, alone, here, numbers, group).heads(chunks)

        few, heads = self.remembered((recipe.model, recipe.objective, alone, numbers, chunks), find)
        if chunks == 1:
            head = _extended(heads[0], heads[1], tokens / few)
        else:
            of_two, of_three = (_extended(heads[n], heads[n + 1], chunk / few) for n in (0, 2))
            head = _extended(of_two, of_three, max(tokens / chunk, 2) - 1)
        return Layers([*kinds, Kind(head, head)], one.shared * here.rows)


def _extended(one: LayerBytes, two: LayerBytes, rows: float) -> LayerBytes:
    """Of so many rows, from those of one and two: all that layers hold grows evenly with them."""
    return LayerBytes(*(int(a + (rows - 1) * (b - a)) for a, b in zip(one, two, strict=True)))


class _Trial:
    def __init__(self, recipe: Recipe, mesh: Mesh, tokens: RowsHere, numbers: Numbers, group: Any) -> None:
        self.recipe, self.model, self.mesh = recipe, recipe.model, mesh
        self.tokens, self.numbers = tokens, numbers
        self.parts = Parts(group, mesh) if group is not None else None
        here = slice(0, tokens.length // mesh.sequence)
        lengths = [tokens.length // tokens.documents] * (tokens.rows * tokens.documents)
        positions = torch.empty(tokens.rows, tokens.length, dtype=torch.int64)
        whole = Documents(
            positions, lengths, torch.empty(len(lengths) + 1, dtype=torch.int32), copies=recipe.objective.copies
        )
        self.documents = whole.part(here) if mesh.sequence > 1 else whole
        adapters = recipe.adapters
        routing = torch.empty(tokens.rows, dtype=torch.int64) if adapters.names and not adapters.members else None
        self.documents.route(routing, adapters.members)
        self.live = LiveBytes()

    def run(self) -> Layers:
        """The head's place is taken by nothing yet, since it goes through the tokens chunk by chunk."""
        shared, nothing = self._rotary(), LayerBytes(0, 0, 0, 0, 0)
        known: dict[Any, tuple[Kind, Tensor]] = {}
        x = torch.empty(self.documents.position_ids.shape, dtype=torch.int64)
        kinds = []
        for entry in layer_plan(self.model)[:-2]:
            kind = entry.cls, entry.adapters is None, tuple(x.shape), x.requires_grad
            if kind not in known:
                layer = self._build(entry)
                plain, out = self._measure(partial(self._through, layer), layer, x)
                again = plain
                if entry.cls is Block and out.requires_grad:
                    again, _ = self._measure(partial(self._recomputed, layer), layer, x)
                known[kind] = Kind(plain, again), out
            found, x = known[kind]
            kinds.append(found)
        return Layers([*kinds, Kind(nothing, nothing)], shared)

    def _through(self, layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x, self.documents)

    def _recomputed(self, layer: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(layer, x, self.documents, use_reentrant=False)

    def _rotary(self) -> int:
        if self.model.position_embedding != "rope":
            return 0
        d, spread = self.model.head_width, max(1, self.recipe.adapters.members)
        here = self.documents.position_ids.numel()
        self.documents.rotary = (
            torch.empty(*self.documents.position_ids.shape, 1, d),
            torch.empty(*self.documents.position_ids.shape, 1, d // 2),
        )
        if self.documents.spread is not None:
            shape = self.documents.spread.position_ids.shape
            self.documents.spread.rotary = torch.empty(*shape, 1, d), torch.empty(*shape, 1, d // 2)
        return 4 * (d + d // 2) * here * (1 + spread * (self.documents.spread is not None))

    def _build(self, entry: Layer) -> nn.Module:
        usual = torch.get_default_dtype()
        torch.set_default_dtype(self.numbers.weights)  # fake parameters cannot be cast later
        layer = entry.build(0)
        torch.set_default_dtype(usual)
        if self.parts:
            layer = divide_layer(layer, self.model, self.parts)
        if self.numbers.products:
            use_products(layer)
        for module in layer.modules():
            if isinstance(module, Attention):
                module.attend = partial(self._attend, module.attend)
        return layer

    def _attend(
        self, usual: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, documents: Documents, visibility: Any
    ) -> Tensor:
        """As much as `model.attention.attend` holds, and the exchange of a sequence group around it."""
        if self.mesh.sequence == 1:
            return self._kernel(usual, q, k, v, documents, visibility)
        if self.mesh.exchange == "keys":  # at most those of whole rows
            q, k = q.to(v.dtype), k.to(v.dtype)
            k, v = (AllKeys.apply(x, self.tokens.length) for x in (k, v))
            return flash(q, k, v)
        n = self.mesh.sequence
        if (copies := n // k.shape[2]) > 1:
            k, v = (x.repeat_interleave(copies, dim=2) for x in (k, v))
        q, k, v = (HeadsForTokens.apply(x, n, True) for x in (q, k, v))
        return HeadsForTokens.apply(self._kernel(usual, q, k, v, documents, visibility), n, False)

    def _kernel(
        self, usual: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, documents: Documents, visibility: Any
    ) -> Tensor:
        if self.numbers.device == "cuda" or visibility.span != 1 or documents.copies == 2:
            return flash(q, k, v)
        return usual(q, k, v, documents, visibility)

    def heads(self, chunks: int) -> tuple[int, list[LayerBytes]]:
        """Of the last norm and the head with the loss: one chunk of n and of 2 n tokens, or of each length two and three.

        A chunk takes as much as any other and grows evenly. The softmax is made of more rows at a time than in training,
        which is quicker: of a large vocabulary it is little beside a chunk of logits, and less beside two.
        """
        model, split = self.model, self.mesh.tensor if self.mesh.split_rows else 1
        norm: Any
        head: Any
        norm, head = (self._build(entry) for entry in layer_plan(model)[-2:])
        if head.weight is None:
            head.weight = self._build(layer_plan(model)[0]).weight
        trained = bool(norm.weight.requires_grad or self.recipe.adapters.names)

        def of(each: int, number: int) -> LayerBytes:
            shape = 1, each * number // split, model.hidden_size

            def run(y: Tensor) -> Tensor:
                y = norm(y, self.documents)
                if self.recipe.objective.name == "contrastive":
                    return y.float().square().sum()
                y = self.parts.enter(y) if self.parts else y
                part = VocabularyPart(0, self.parts.stack) if self.parts else None
                targets = torch.empty(1, each * number, dtype=torch.int64)
                return linear_cross_entropy(y, head.weight, targets, chunk_tokens=each, part=part)[0]

            like = torch.empty(shape, dtype=self.numbers.weights, requires_grad=trained)
            return self._measure(run, nn.ModuleList([norm, head]), like)[0]

        few, rows = CHUNK_TOKENS // 2, CHUNK_TOKENS // 16 if chunks == 1 else CHUNK_TOKENS // 4
        slab = max(loss.SLAB_ELEMENTS, rows * len(head.weight))
        scaled = _scaled_on_cpu if self.numbers.device == "cpu" else loss._scaled
        with mock.patch.object(loss, "SLAB_ELEMENTS", slab), mock.patch.object(loss, "_scaled", scaled):
            numbers = (1,) if chunks == 1 else (2, 3)
            return few, [of(each, number) for number in numbers for each in (few, 2 * few)]

    def _measure(self, run: Callable[[Tensor], Tensor], layer: nn.Module, like: Tensor) -> tuple[LayerBytes, Tensor]:
        """Of a layer for an input like this one, and something like its output."""
        trained = [p for p in layer.parameters() if p.requires_grad]
        gradients = [p.numel() * p.element_size() for p in trained]
        forward, kept, backward, out = self._pass(run, layer, like, trained)
        return LayerBytes(forward, kept, backward, sum(gradients), max(gradients, default=0)), out

    def _pass(
        self, run: Callable[[Tensor], Tensor], layer: nn.Module, like: Tensor, forgotten: list[nn.Parameter]
    ) -> tuple[int, int, int, Tensor]:
        """`forgotten`: parameters whose gradients go at once."""
        live = self.live
        live.leave_out(*layer.parameters(), *self._constants())
        hooks = [p.register_post_accumulate_grad_hook(_forget) for p in forgotten]
        cast = self.numbers.autocast
        before = live.peak = live.bytes
        with live:
            x = torch.empty(like.shape, dtype=like.dtype)
            if like.requires_grad:  # not a leaf, which its graph would keep whether or not a gradient needs it
                x = torch.empty(1, dtype=like.dtype, requires_grad=True).expand(like.shape).contiguous()
            with torch.autocast("cpu", cast) if cast else contextlib.nullcontext():
                y = run(x)
            forward, backward = live.peak - before, 0
            shape, dtype, needed = y.shape, y.dtype, y.requires_grad
            edge = torch.autograd.graph.get_gradient_edge(y) if needed else None
            del x, y
            kept = live.bytes - before
            live.peak = live.bytes
            if edge is not None:
                torch.autograd.backward((edge,), (torch.empty(shape, dtype=dtype),))
                backward = live.peak - before
            del edge
        for hook in hooks:
            hook.remove()
        return forward, kept, backward, torch.empty(shape, dtype=dtype, requires_grad=needed)

    def _constants(self) -> list[Tensor]:
        each = [self.documents, *([self.documents.spread] if self.documents.spread else [])]
        found = [
            tensor for one in each for tensor in (one.position_ids, one.cu_seqlens, one.routing, *(one.rotary or ()))
        ]
        return [tensor for tensor in found if tensor is not None]


def _scaled_on_cpu(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`loss._scaled` without what it makes of a slab at a time."""
    return torch.empty_like(grad, dtype=dtype)


def _forget(parameter: Tensor) -> None:
    parameter.grad = None
