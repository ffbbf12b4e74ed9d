"""An optimizer step on two ranks as this repository, a bare loop and `transformers`' Trainer do it; and what it sends."""

import gc
import json
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from engine.reduction.wire import WireBytes
from engine.run.begin import begin
from engine.run.loop import new_state
from engine.run.plan import RunPlan
from engine.run.samples import StepSamples
from model.llama import Llama
from training.optimizer import parameter_groups

Step = Callable[[], Any]
Sent = dict[str, tuple[int, float]]
"""By kind of collective: calls, and the mean of the bytes that this rank hands in."""
STAGES = range(4)
BARE = "DistributedDataParallel"


def contestants(plan_of: Callable[[int], tuple[RunPlan, Path]], wanted: Sequence[str] | None) -> dict[str, Step]:
    """The bare loop first. `plan_of`: with the JSON of a stage, and that JSON."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    steps: dict[str, Step] = {BARE: bare_loop(plan_of(0)[0])}
    for stage in STAGES:
        for name, make in ((f"longform ZeRO-{stage}", ours), (f"transformers ZeRO-{stage}", trainer)):
            if wanted is None or name in wanted:
                usual = F.linear
                steps[name] = with_linear(make(*plan_of(stage)), F.linear)
                F.linear = usual
                gc.collect()
    return steps


def with_linear(step: Step, linear: Callable[..., Tensor]) -> Step:
    """ZeRO-3 puts a function of its own in the place of torch's for the whole process, and leaves it there."""

    def run() -> Any:
        usual, F.linear = F.linear, linear
        try:
            return step()
        finally:
            F.linear = usual

    return run


def ours(plan: RunPlan, _: Path) -> Step:
    return begin(plan).step


def bare_loop(plan: RunPlan) -> Step:
    """Gradients of the mean over a rank's targets, summed over the ranks with the last micro-batch."""
    recipe, state, samples = plan.recipe, new_state(plan), StepSamples(plan)
    model = Llama(recipe.model, recipe.training.seed)
    parallel = DistributedDataParallel(model)
    options: dict[str, Any] = {
        "lr": recipe.optimizer.lr,
        "betas": tuple(recipe.optimizer.betas),
        "eps": recipe.optimizer.eps,
    }
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe.optimizer), fused=True, **options)

    def step() -> float:
        batches = samples.after(state)
        targets, total = sum(batch["num_targets"] for batch in batches), torch.zeros(())
        for number, batch in enumerate(batches):
            parallel.require_backward_grad_sync = number == len(batches) - 1
            objective, _ = parallel(
                batch["input_ids"],
                batch["position_ids"],
                targets=batch["targets"],
                z_loss_weight=recipe.training.z_loss_weight,
            )
            (objective / targets).backward()
            total += objective.detach()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.max_grad_norm or float("inf"))
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate(state.step + 1)
        optimizer.step()
        optimizer.zero_grad()
        state.advance(plan.batch.samples, plan.step_tokens, True)
        return float(total) / targets

    return step


class Turns(TrainerCallback):
    """Lets a Trainer, which runs in a thread of its own, do one step at a time."""

    def __init__(self) -> None:
        self.asked, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.error: BaseException | None = None

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.done.release()
        self.asked.acquire()

    def step(self) -> None:
        self.asked.release()
        self.wait()

    def wait(self) -> None:
        self.done.acquire()
        if self.error:
            raise self.error


class Rows(torch.utils.data.Dataset):
    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return 100_000

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.ids[index % len(self.ids)]
        return {"input_ids": ids, "labels": ids}


def trainer(plan: RunPlan, ds_config: Path) -> Step:
    """Its first step is done when this returns."""
    recipe, turns = plan.recipe, Turns()
    process = PartialState(cpu=True)
    process.distributed_type = DistributedType.DEEPSPEED  # accelerate 1.15 finds DeepSpeed beside GPUs only
    AcceleratorState._shared_state = {}  # each Trainer has its own, where a process usually has one
    batches = StepSamples(plan).after(new_state(plan))
    arguments = TrainingArguments(
        output_dir=str(ds_config.with_suffix("")),
        deepspeed=json.loads(ds_config.read_text()),
        per_device_train_batch_size=plan.batch.micro_batch_samples,
        gradient_accumulation_steps=plan.batch.accumulation,
        max_steps=plan.total_steps,
        learning_rate=recipe.optimizer.lr,
        adam_beta1=recipe.optimizer.betas[0],
        adam_beta2=recipe.optimizer.betas[1],
        adam_epsilon=recipe.optimizer.eps,
        weight_decay=recipe.optimizer.weight_decay,
        max_grad_norm=recipe.optimizer.max_grad_norm or 0.0,
        accelerator_config={"use_configured_state": True},
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**recipe.model.to_hf()), attn_implementation="sdpa")
    rows = Rows(torch.cat([batch["input_ids"] for batch in batches]))
    each = Trainer(model, arguments, train_dataset=rows, callbacks=[turns])

    def run() -> None:
        try:
            each.train()
        except BaseException as error:
            turns.error = error
            turns.done.release()

    threading.Thread(target=run, daemon=True).start()
    turns.wait()
    return turns.step


def sent(step: Step, gradients: int | None) -> Sent:
    """In a step. `gradients`: their bytes, where torch's own reducer sums them, in front of which nothing stands."""
    with WireBytes() as wire:
        step()
    if gradients is not None:
        return {"all_reduce": (1, float(gradients))}
    return {kind: (each.calls, each.bytes / each.calls) for kind, each in wire.by_operation.items() if each.bytes}


def sending_seconds(traffic: Sent) -> float:
    """What the same number of calls of the same mean size takes by itself."""
    calls: list[Callable[[], Any]] = []
    ranks = dist.get_world_size()
    for kind, (number, size) in traffic.items():
        own = torch.ones(-(-int(size) // (4 * ranks)) * ranks)
        whole, part = own.new_empty(ranks * len(own)), own.new_empty(len(own) // ranks)
        call: dict[str, Callable[[], Any]] = {
            "all_reduce": partial(dist.all_reduce, own),
            "all_gather": partial(dist.all_gather_into_tensor, whole, own),
            "reduce_scatter": partial(dist.reduce_scatter_tensor, part, own),
            "reduce": partial(dist.reduce, own, 0),
            "broadcast": partial(dist.broadcast, own, 0),
        }
        calls += [call[kind]] * number
    dist.barrier()
    began = time.perf_counter()
    for each in calls:
        each()
    dist.barrier()
    return time.perf_counter() - began
