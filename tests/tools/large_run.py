"""A run whose weights are far larger than what a command may take, and what a process takes."""

import itertools
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import xxhash

from engine.checkpoint.manifest import MANIFEST, read_manifest, seal, steps
from model.config import ModelConfig
from model.llama import Llama
from tests.processes import run_cli
from tests.tools.trained import RECIPE, Trained

LARGE_MODEL = RECIPE["model"] | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 7,
    "num_attention_heads": 16,
    "head_dim": 64,
}


class LargeRun(NamedTuple):
    """A run whose only checkpoint, of ZeRO-2 on two ranks, has more than 400 MB of weights."""

    folder: Path
    shards: list[Path]
    """The optimizer files, one a rank."""
    starts: dict[str, int]
    """Where each parameter begins in the vector of all weights, which is cut over the ranks."""

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.shards)

    @staticmethod
    def values(start: int, count: int) -> torch.Tensor:
        """Elements of that vector: each says where it stands."""
        return (torch.arange(start, start + count) % 65521).float()


def write_large_run(trained: Trained, run: Path) -> LargeRun:
    """The files of a real run with another checkpoint, written in the form of DeepSpeed's."""
    newest = steps(trained.folder / "zero2")[0]
    shutil.copytree(trained.folder / "zero2/tokenizer", run / "tokenizer")
    folder = run / "checkpoints" / newest.name
    folder.mkdir(parents=True)
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in Llama(ModelConfig(**LARGE_MODEL)).named_parameters()}
    ends = list(itertools.accumulate(shape.numel() for shape in shapes.values()))
    share = -(-ends[-1] // 2)
    torch.save({"param_shapes": [shapes]}, folder / "mp_rank_00_model_states.pt")
    shards = [folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2)]
    for rank, shard in enumerate(shards):
        weights = {"single_partition_of_fp32_groups": [LargeRun.values(rank * share, share)]}
        torch.save({"optimizer_state_dict": weights | {"base_optimizer_state": {"state": {}}}}, shard)
    manifest = read_manifest(newest, full=False)
    manifest.recipe["model"] = LARGE_MODEL
    manifest.files = {
        path.name: (path.stat().st_size, xxhash.xxh3_128(path.read_bytes()).hexdigest()) for path in folder.iterdir()
    }
    (folder / MANIFEST).write_bytes(seal(manifest))
    return LargeRun(run, shards, dict(zip(shapes, [0, *ends], strict=False)))


def anonymous_bytes(pid: int) -> int:
    """What a process holds for itself; pages of mapped files, which the kernel can drop at any time, do not count."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


def with_all_imports() -> int:
    """What a process holds that has imported what an export needs, and read nothing."""
    script = (
        "from engine.safe_load import allow_deepspeed_classes; allow_deepspeed_classes(); "
        "import engine.run.whole_weights, model.hf.weights, tools.export, tools.hf_tokenizer, tools.trained; "
        "import transformers.generation.continuous_batching; "
        "print(open('/proc/self/status').read().split('RssAnon:')[1].split()[0])"
    )
    done = run_cli([sys.executable, "-c", script], env={"MALLOC_MMAP_THRESHOLD_": "1000000"})
    return int(done.stdout.split()[-1]) * 1024
