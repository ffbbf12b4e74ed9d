"""What a rank does in the tests of compressed reduction: many steps of a stand-in engine with random gradients."""

import hashlib
from pathlib import Path

import torch
import torch.distributed as dist

from engine.reduction.compression import compressed_reduction
from engine.reduction.compressors import merged
from engine.reduction.wire import WireBytes
from tests.engine.programs import join_process_group

SHAPES = {
    "wide": (24, 100),
    "small": (5, 7),
    "tall": (130, 40),
    "cube": (20, 6, 15),
    "again": (24, 100),
    "vector": (500,),
}
COMPRESSED = [name for name in SHAPES if name not in ("small", "vector")]
MIN_ELEMENTS = 100


class StandIn:
    """What the reduction needs of a DeepSpeed engine: parameters, a count of steps and a method that averages."""

    def __init__(self, section: dict | None, seed: int = 0):
        self.module = torch.nn.ParameterDict({name: torch.zeros(shape) for name, shape in SHAPES.items()})
        self.global_steps = 0
        self.generator = torch.Generator().manual_seed(1000 * seed + dist.get_rank())
        self.reduction = compressed_reduction(self, section)

    def buffered_allreduce_fallback(self, grads=None, elements_per_buffer=500_000_000):
        grads = [p.grad for p in self.module.values()] if grads is None else grads
        if grads:
            flat = torch.cat([grad.flatten() for grad in grads])
            dist.all_reduce(flat)
            for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_((part / dist.get_world_size()).view_as(grad))

    def step(self, poison: float | None = None) -> dict[str, torch.Tensor]:
        """One reduction of heavy-tailed gradients with something in common; returns their true mean over the ranks."""
        common = torch.Generator().manual_seed(self.global_steps)
        true = {}
        for name, parameter in self.module.items():
            own = torch.randn(parameter.shape, generator=self.generator) ** 3
            parameter.grad = own + 3 * torch.randn(parameter.shape, generator=common)
            true[name] = parameter.grad.double()
            dist.all_reduce(true[name])
            true[name] /= dist.get_world_size()
        if poison is not None and dist.get_rank() == dist.get_world_size() - 1:
            self.module["tall"].grad[3, 4] = poison
        self.buffered_allreduce_fallback()
        self.global_steps += 1
        return true

    def digest(self) -> str:
        """Of all gradients, bit by bit."""
        bits = b"".join(p.grad.numpy().tobytes() for p in self.module.values())
        return hashlib.blake2b(bits, digest_size=8).hexdigest()


def saved_states(engine, folder: Path) -> list[dict]:
    """The states of the compressed reduction on all ranks, as a checkpoint has them."""
    folder.mkdir(parents=True, exist_ok=True)
    name, state = engine.reduction.file()
    torch.save(state, folder / name)
    dist.barrier()
    return [torch.load(file) for file in sorted(folder.glob("gradient_compression_*.pt"))]


def equal(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def reduced(folder: str, sections: dict[str, dict], steps: int) -> dict[str, dict]:
    """Per section: what came out of so many steps, of a poisoned one and of a restored state."""
    join_process_group()
    results = {}
    for name, section in sections.items():
        path = Path(folder) / name / f"world{dist.get_world_size()}"
        engine, digests, wire_bytes = StandIn(section), [], []
        applied = {key: torch.zeros(shape, dtype=torch.float64) for key, shape in SHAPES.items()}
        true = {key: torch.zeros(shape, dtype=torch.float64) for key, shape in SHAPES.items()}
        for _ in range(steps):
            for key, value in engine.step().items():
                true[key] += value
                applied[key] += engine.module[key].grad
            digests.append(engine.digest())
            wire_bytes.append(engine.reduction.wire_bytes)
        before = saved_states(engine, path)
        owed = merged(before)
        scale = max(float(value.abs().max()) for value in true.values())
        lost = {key: float((true[key] - applied[key] - owed.get(key, 0)).abs().max()) / scale for key in SHAPES}

        own = before[dist.get_rank()]["residuals"]
        apart = sum(float((own[key] - value).square().sum()) for key, value in owed.items())
        together = sum(float(value.square().sum()) for value in owed.values())

        all_nan, untouched = [], []
        for poison in (float("nan"), float("inf"), 3e38):
            engine.step(poison)
            all_nan.append(all(bool(torch.isnan(p.grad).all()) for p in engine.module.values()))
            untouched.append(equal(saved_states(engine, path / "poisoned"), before))
        twin = StandIn(section)
        twin.reduction.restore(path)
        twin.global_steps = engine.global_steps
        twin.generator.set_state(engine.generator.get_state())
        continued = []
        for one in (engine, twin):
            one.step()
            continued.append(one.digest())
        with WireBytes() as wire:
            engine.reduction.reduce()
        results[name] = {
            "digests": digests,
            "wire_bytes": wire_bytes,
            "counted_outside": wire.total == engine.reduction.wire_bytes,
            "ring_bytes": wire.ring_total,
            "residuals": sorted(before[0]["residuals"]),
            "lost": lost,
            "owed": max(float(value.abs().max()) for value in owed.values()) / scale if owed else 0.0,
            "apart": (apart / together) ** 0.5 if owed else 0.0,
            "all_nan": all_nan,
            "untouched": untouched,
            "continued": continued,
        }
    return results


def moved(folder: str, pairs: list[tuple[str, dict, str]]) -> list[dict]:
    """Per (checkpoint, section, its name here): restore what other ranks or settings wrote, then one more step."""
    join_process_group()
    results = []
    for checkpoint, section, name in pairs:
        owed = merged([torch.load(file) for file in sorted((Path(folder) / checkpoint).glob("*.pt"))])
        engine = StandIn(section, seed=1)
        engine.reduction.restore(Path(folder) / checkpoint)
        engine.global_steps = 100
        path = Path(folder) / name
        kept = merged(saved_states(engine, path / "restored"))
        true = engine.step()
        after = merged(saved_states(engine, path))
        due = {key: value + owed.get(key, 0) for key, value in true.items()}
        lost = {key: due[key] - engine.module[key].grad - after.get(key, 0) for key in SHAPES}
        results.append(
            {
                "total_kept": all(
                    torch.allclose(kept[key], value, atol=1e-5, rtol=1e-5) for key, value in owed.items()
                ),
                "owed_something": bool(owed),
                "lost": max(float(value.abs().max()) for value in lost.values()),
                "scale": max(float(value.abs().max()) for value in due.values()),
                "residuals": sorted(after),
                "digest": engine.digest(),
            }
        )
    return results
