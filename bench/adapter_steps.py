"""The steps that `bench.adapters` measures, and their figures."""

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from model.adapter_config import PROJECTIONS, AdaptersConfig
from model.config import ModelConfig
from model.hf.weights import to_hf_state
from model.llama import Llama
from training.optimizer import parameter_groups
from training.sections import OptimizerConfig
from training.separate_adamw import SeparateAdamW

BASE = ModelConfig(
    vocab_size=4096,
    hidden_size=320,
    intermediate_size=864,
    num_hidden_layers=8,
    num_attention_heads=5,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
)
RANK, LAST_LAYERS = 16, 2
Step = Callable[[], Any]


class Job:
    """A model with so many adapters and rows for it, dealt out to the adapters in turn."""

    def __init__(self, adapters: int, rows: int, tokens: int, device: torch.device, **more: Any) -> None:
        config = AdaptersConfig(names=tuple(f"a{number}" for number in range(adapters)), r=RANK, **more)
        self.config = BASE.model_copy(update={"adapters": config})
        self.model = Llama(self.config, seed=1).to(device)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(BASE.vocab_size, (rows, tokens + 1), generator=generator).to(device)
        self.ids, self.targets = ids[:, :-1], ids[:, 1:].contiguous()
        self.routing = torch.arange(rows, device=device) % adapters

    def routed(self) -> None:
        self._backward(self.model(self.ids, targets=self.targets, adapters=self.routing)[0])

    def mixture(self) -> None:
        self._backward(self.model(self.ids, targets=self.targets)[0])

    def hard(self) -> None:
        """As mode hard: each row is a document, and chooses."""
        with torch.no_grad():
            places = self.model(self.ids, targets=self.targets)[1][1 + len(self.config.adapters.names) :].long()
        tokens = places[:, None].expand(self.ids.shape)
        self._backward(self.model(self.ids, targets=self.targets, adapters=tokens)[0])

    def _backward(self, objective: torch.Tensor) -> None:
        (objective / self.targets.numel()).backward()
        self.model.zero_grad(set_to_none=True)


def pefts_mixed_batch(adapters: int, job: Job) -> Step:
    """The same rows and base through PEFT on transformers with sdpa. It is documented for inference, so the model has to be in
    evaluation mode, and what is trained is said by hand."""
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**BASE.to_hf()), attn_implementation="sdpa")
    plain = {name: tensor for name, tensor in job.model.state_dict().items() if "lora_" not in name}
    theirs.load_state_dict(to_hf_state(plain, BASE), strict=False)
    theirs.tie_weights()
    lora = LoraConfig(r=RANK, lora_alpha=32, target_modules=list(PROJECTIONS), task_type="CAUSAL_LM")
    model = get_peft_model(theirs, lora, adapter_name="a0")
    assert isinstance(model, PeftModel)
    for number in range(1, adapters):
        model.add_adapter(f"a{number}", lora)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    model.eval().to(job.ids.device)
    names = [f"a{number}" for number in job.routing.tolist()]

    def step() -> None:
        model(job.ids, labels=job.ids, shift_labels=job.targets, use_cache=False, adapter_names=names).loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def compare(rows: int, tokens: int, rounds: int, device_name: str | None) -> None:
    """All contenders in turn, then their ratios."""
    device = torch.device(device_name or ("cuda" if torch.cuda.is_available() else "cpu"))
    jobs = {number: Job(number, rows, tokens, device) for number in (1, 4, 16)}
    few = {mode: Job(16, 4, tokens, device, mode=mode) for mode in ("mixture", "hard")}
    last = {number: Job(number, rows, tokens, device, last_layers=LAST_LAYERS) for number in (1, 16)}
    share = Job(1, rows // 4, tokens, device)
    steps: dict[str, Step] = {_routed(number): job.routed for number, job in jobs.items()}
    steps["PEFT's mixed batch, 16 adapters"] = pefts_mixed_batch(16, jobs[16])
    steps["a quarter of the rows, 1 adapter"] = share.routed
    steps |= {f"16 adapters in the last {LAST_LAYERS} blocks": last[16].routed}
    steps |= {"mixture, 16 adapters, 4 rows": few["mixture"].mixture, "hard, 16 adapters, 4 rows": few["hard"].hard}
    took: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            took[name].append(_seconds(step, device))
    size = BASE.num_parameters() / 1e6
    print(
        f"{size:.0f}M base, {rows} x {tokens} tokens, float32, {device}, torch {torch.__version__}, {rounds} rounds\n"
    )
    for name, seconds in took.items():
        print(f"{name:36s} {statistics.median(seconds):8.3f} s a step")
    print()

    def ratio(what: str, first: str, second: str, times: float = 1.0) -> None:
        found = [times * a / b for a, b in zip(took[first], took[second], strict=True)]
        print(f"{what}: {statistics.median(found):.2f} (rounds {', '.join(f'{each:.2f}' for each in found)})")

    one, four, sixteen = map(_routed, (1, 4, 16))
    ratio("speed of 4 adapters in one batch, by that of 1", one, four)
    ratio("speed of 16 adapters in one batch, by that of 1", one, sixteen)
    ratio("speed of 16 adapters in one batch, by PEFT's", "PEFT's mixed batch, 16 adapters", sixteen)
    ratio("time of 4 jobs, by that of one job with 4 adapters", "a quarter of the rows, 1 adapter", four, times=4)
    ratio("cost of hard EM, by that of the mixture", "hard, 16 adapters, 4 rows", "mixture, 16 adapters, 4 rows")
    print(f"  by the arithmetic: {_flops(few['hard'], tokens) / _flops(few['mixture'], tokens):.2f}")
    ratio(
        f"cost of adapters in the last {LAST_LAYERS} of 8 blocks, by that in all",
        f"16 adapters in the last {LAST_LAYERS} blocks",
        sixteen,
    )
    print(f"  by the arithmetic: {_flops(last[16], tokens) / _flops(jobs[16], tokens):.2f}")
    print()
    del jobs, few, last, share, steps
    memory(rows, tokens, device)


def _routed(adapters: int) -> str:
    return f"routed, {adapters} adapter{'s' if adapters > 1 else ''}"


def _flops(job: Job, tokens: int) -> float:
    return job.config.flops_per_token(tokens)


def _seconds(step: Step, device: torch.device) -> float:
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def memory(rows: int, tokens: int, device: torch.device) -> None:
    """What is held between steps, of 16 adapters and their optimizer: tensors that are alive, each storage once."""
    gc.collect()
    before = _alive()
    job = Job(16, rows, tokens, device)
    of_job = sum(tensor.nbytes for tensor in (job.ids, job.routing))
    optimizer = SeparateAdamW(parameter_groups(job.model, OptimizerConfig()), max_norm=1.0, lr=1e-3)
    (job.model(job.ids, targets=job.targets, adapters=job.routing)[0] / job.targets.numel()).backward()
    optimizer.step()
    optimizer.zero_grad()
    gc.collect()
    held = _alive() - before - of_job
    of_base, adapters = 4 * BASE.num_parameters(), 4 * job.config.num_adapter_parameters()
    apart = 16 * of_base + 3 * adapters
    print(
        f"memory between steps, 16 adapters: {held / 2**20:.1f} MiB, {of_base / 2**20:.1f} of it the base; the rest is "
        f"{(held - of_base) / (3 * adapters):.3f} of weights and two moments; 16 jobs hold {apart / held:.1f} times as much"
    )


def _alive() -> int:
    tensors = [found for found in gc.get_objects() if isinstance(found, torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
