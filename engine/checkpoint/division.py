"""Where every element of a model's states lies, and so what a rank has to read of another division: from shapes alone.

Weights and moments lie cut in the same way, over pipeline stages and tensor-parallel ranks (together: parts, each with files of
its own) and within a part over its data ranks:

    stage 0      whole, on the first rank
    stage 1, 2   the parameters of a group stand one after another in one vector, which is cut evenly over the ranks
    stage 3      every parameter by itself is cut evenly (rounded up) over the ranks; each rank keeps its pieces in order

`Division.reads` is the plan of reads: resume carries it out, and `bench.checkpoint` adds it up for machines that it lacks.
"""

from collections.abc import Iterator
from functools import cached_property
from math import prod
from typing import NamedTuple

Shape = tuple[int, ...]
Shapes = dict[str, Shape]


class Slice(NamedTuple):
    """Columns low .. high - 1 of a parameter seen as [rows, width]: what a tensor-parallel rank has of it, flattened."""

    rows: int
    width: int
    low: int
    high: int

    @property
    def columns(self) -> int:
        return self.high - self.low


def slice_at(shape: Shape, dimension: int | None, rank: int, ranks: int) -> Slice:
    """The slice of a whole parameter that `engine.layout.slices.slice_of` takes."""
    if dimension is None:
        return Slice(1, prod(shape), 0, prod(shape))
    rows, inner = prod(shape[:dimension]), prod(shape[dimension + 1 :])
    base, longer = divmod(shape[dimension], ranks)
    low = rank * base + min(rank, longer)
    return Slice(rows, shape[dimension] * inner, low * inner, (low + base + (rank < longer)) * inner)


class Box(NamedTuple):
    """`rows` runs of `width` elements: where the first begins in a source and in a target, and how far apart they are."""

    source: int
    source_stride: int
    target: int
    target_stride: int
    rows: int
    width: int


def overlap(source: Slice, given: range, target: Slice, wanted: range) -> Iterator[Box]:
    """What elements `given` of one slice of a parameter and `wanted` of another, both flattened, have in common."""
    low, high = max(source.low, target.low), min(source.high, target.high)
    if low >= high or not given or not wanted:
        return
    spans = [(source.columns, low - source.low, given), (target.columns, low - target.low, wanted)]
    common, whole = range(source.rows), range(source.rows)
    for columns, begin, elements in spans:
        end = begin + high - low
        touched = range(max((elements.start - end) // columns + 1, 0), -(-(elements.stop - begin) // columns))
        complete = range(-(-(elements.start - begin) // columns), (elements.stop - end) // columns + 1)
        common, whole = _both(common, touched), _both(whole, complete)
    whole = _both(whole, common)
    for row in [
        *range(common.start, min(whole.start, common.stop)),
        *range(max(whole.stop, common.start), common.stop),
    ]:
        cut_low, cut_high = 0, high - low
        for columns, begin, elements in spans:
            first = row * columns + begin
            cut_low, cut_high = max(cut_low, elements.start - first), min(cut_high, elements.stop - first)
        if cut_low < cut_high:
            yield _box(spans, row, cut_low, 1, cut_high - cut_low)
    if whole:
        yield _box(spans, whole.start, 0, len(whole), high - low)


def _both(one: range, other: range) -> range:
    """Empty ranges keep a place inside `one`."""
    start = min(max(one.start, other.start), one.stop)
    return range(start, max(min(one.stop, other.stop), start))


def _box(spans: list[tuple[int, int, range]], row: int, column: int, rows: int, width: int) -> Box:
    (source, source_begin, _), (target, target_begin, _) = spans
    if source == target == width:
        rows, width = 1, rows * width
    starts = row * source + source_begin + column, row * target + target_begin + column
    return Box(starts[0], source, starts[1], target, rows, width)


class Stretch(NamedTuple):
    """Elements first .. first + length - 1 of a part of a parameter, flattened, and where a data rank has them."""

    rank: int
    group: int
    """Of the rank's vectors."""
    offset: int
    first: int
    length: int


class PartDivision:
    """The parameters of one part over its data ranks.

    `groups`: shapes within the part, in the order of the vectors. At stages 1 and 2 `sizes` has the elements of each group's
    vector on one rank and `paddings` the gaps after its parameters. At stage 0 every parameter is a group.
    """

    def __init__(
        self,
        zero_stage: int,
        ranks: int,
        groups: list[Shapes],
        sizes: list[int] | None = None,
        paddings: list[list[int]] | None = None,
    ) -> None:
        self.zero_stage, self.ranks, self.sizes = zero_stage, ranks, sizes or []
        self.shapes = {name: tuple(shape) for group in groups for name, shape in group.items()}
        self.places: dict[str, tuple[int, int]] = {}
        offset = 0
        for number, group in enumerate(groups):
            offset = offset if zero_stage == 3 else 0
            for index, (name, shape) in enumerate(group.items()):
                self.places[name] = (len(self.places) if zero_stage == 0 else 0 if zero_stage == 3 else number), offset
                if zero_stage == 3:
                    offset += -(-prod(shape) // ranks)
                elif zero_stage:
                    offset += prod(shape) + (paddings[number][index] if paddings else 0)

    def stretches(self, name: str, first: int, last: int) -> Iterator[Stretch]:
        """Where elements first .. last - 1 lie."""
        (group, offset), numel = self.places[name], prod(self.shapes[name])
        first, last = max(first, 0), min(last, numel)
        if first >= last:
            return
        if self.zero_stage == 0:
            yield Stretch(0, group, first, first, last - first)
            return
        size = -(-numel // self.ranks) if self.zero_stage == 3 else self.sizes[group]
        shift = 0 if self.zero_stage == 3 else offset
        for rank in range((shift + first) // size, (shift + last - 1) // size + 1):
            begin = max(first, rank * size - shift)
            end = min(last, (rank + 1) * size - shift)
            yield Stretch(rank, group, offset + begin - rank * size, begin, end - begin)

    def kept(self, rank: int) -> Iterator[tuple[str, range]]:
        """What a data rank has: elements of parameters, flattened. At stage 0 every rank has everything."""
        for name, shape in self.shapes.items():
            (group, offset), numel = self.places[name], prod(shape)
            if self.zero_stage == 0:
                first, last = 0, numel
            elif self.zero_stage == 3:
                share = -(-numel // self.ranks)
                first, last = rank * share, (rank + 1) * share
            else:
                first, last = (number * self.sizes[group] - offset for number in (rank, rank + 1))
            if elements := range(max(first, 0), min(last, numel)):
                yield name, elements


class Read(NamedTuple):
    """A box that one rank of the source has in one of its vectors; `box.target` is in the slice that was asked for."""

    part: int
    rank: int
    group: int
    box: Box


class Division:
    """A model's states over all ranks. `parts`: of every pipeline stage its tensor-parallel ranks, one after another."""

    def __init__(self, parts: list[PartDivision], tensor: int, dimensions: dict[str, int | None]) -> None:
        self.parts, self.tensor, self.dimensions = parts, tensor, dimensions

    @cached_property
    def first_parts(self) -> dict[str, int]:
        """Of every parameter the first part that has it or the first slice of it: tied weights are on two stages."""
        found: dict[str, int] = {}
        for part in range(0, len(self.parts), self.tensor):
            for name in self.parts[part].shapes:
                found.setdefault(name, part)
        return found

    @cached_property
    def shapes(self) -> Shapes:
        """Of the whole parameters."""
        found = {}
        for name, first in self.first_parts.items():
            parts = [part.shapes[name] for part in self.parts[first : first + self.tensor]]
            if (cut := self.dimensions[name]) is None:
                found[name] = parts[0]
            else:
                found[name] = *parts[0][:cut], sum(shape[cut] for shape in parts), *parts[0][cut + 1 :]
        return found

    def slice(self, name: str, tensor_rank: int, ranks: int | None = None) -> Slice:
        """Of a parameter on a tensor-parallel rank, of this division or of one with `ranks`."""
        return slice_at(self.shapes[name], self.dimensions[name], tensor_rank, ranks or self.tensor)

    def reads(self, name: str, target: Slice, wanted: range) -> Iterator[Read]:
        """What to read for elements `wanted` of a slice of a parameter, each once."""
        first = self.first_parts[name]
        for tensor_rank in range((1 if self.dimensions[name] is None else self.tensor) if wanted else 0):
            source, part = self.slice(name, tensor_rank), first + tensor_rank
            if source.high <= target.low or target.high <= source.low:
                continue
            if source.rows == 1:
                bounds = [target.low - source.low + element for element in (wanted.start, wanted.stop)]
            else:
                rows = wanted.start // target.columns, -(-wanted.stop // target.columns)
                bounds = [row * source.columns for row in rows]
            for stretch in self.parts[part].stretches(name, *bounds):
                given = range(stretch.first, stretch.first + stretch.length)
                for box in overlap(source, given, target, wanted):
                    place = box._replace(source=box.source - stretch.first + stretch.offset)
                    yield Read(part, stretch.rank, stretch.group, place)

    def kept(self, rank: int) -> Iterator[tuple[str, Slice, range]]:
        """What a rank of a run that is divided like this has to read: elements of its slices of parameters.

        Ranks count through the tensor-parallel group first, then data, then pipeline.
        """
        (others, tensor_rank), ranks = divmod(rank, self.tensor), self.parts[0].ranks
        part = self.parts[others // ranks * self.tensor + tensor_rank]
        readers = dealt({name: prod(shape) for name, shape in part.shapes.items()}, ranks)
        for name, elements in part.kept(others % ranks):
            if part.zero_stage or readers[name] == others % ranks:
                yield name, self.slice(name, tensor_rank), elements


def dealt(sizes: dict[str, int], replicas: int) -> dict[str, int]:
    """Which of several ranks takes which of some things, by their sizes: the largest first, each time who has least."""
    readers, loads = {}, [0] * replicas
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        readers[name] = loads.index(min(loads))
        loads[readers[name]] += sizes[name]
    return readers
