"""What the engine's layouts are compared with: the same steps in one process, by torch alone."""

import contextlib
from functools import partial

import numpy as np
import torch

from engine.layer_statistics import Figures
from engine.run.loop import new_state
from engine.run.plan import make_plan
from engine.run.samples import StepSamples
from launch.topology import Topology
from model.attention import attend
from model.llama import Block, Head, Llama, layer_plan
from training.muon import Muon
from training.optimizer import Lion, parameter_groups
from training.schedule import lr_factor


def plain_torch(setting, overrides: dict):
    """One process, no DeepSpeed: the loss of the whole step differentiated at once."""
    folder, recipe_file, data = setting
    (folder / "zero0.json").write_text('{"zero_optimization": {"stage": 0}}')
    alone = Topology(0, 0, 1, torch.device("cpu"))
    plan = make_plan(recipe_file, overrides, str(folder / "zero0.json"), data, alone)
    recipe = plan.recipe
    model = Llama(recipe.model, seed=recipe.training.seed)
    config = recipe.optimizer
    groups = parameter_groups(model, config)
    if config.is_muon:
        options = {"lr": 1.0, "betas": config.betas, "eps": config.eps, "momentum": config.momentum}
        optimizer = Muon(groups, normalize=config.name == "normuon", **options)
    elif config.name == "lion":
        optimizer = Lion(groups, lr=1.0, betas=config.betas)
    else:
        optimizer = torch.optim.AdamW(groups, lr=1.0, betas=config.betas, eps=config.eps)
    history, layers = [], {}
    state, samples = new_state(plan), StepSamples(plan)
    for step in range(plan.total_steps):
        micro_batches = samples.after(state)
        first = state.consumed_in_stage
        state.advance(plan.batch.samples, plan.step_tokens, applied=True)
        whole = micro_batches[0].items()
        tensors = [key for key, value in whole if isinstance(value, torch.Tensor) and key != "samples"]
        batch = {key: torch.cat([micro_batch[key] for micro_batch in micro_batches]) for key in tensors}
        targets = sum(micro_batch["num_targets"] for micro_batch in micro_batches)
        copies = recipe.objective.copies
        rows = torch.cat([micro_batch["samples"] for micro_batch in micro_batches])
        with watched(model, rows.tolist().index(first)) as figures:
            objective, loss = model(**batch, z_loss_weight=recipe.training.z_loss_weight, copies=copies)
        (objective / targets).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        earlier = {name: p.detach().clone() for name, p in model.named_parameters()}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * lr_factor(recipe.schedule, step + 1, plan.total_steps, plan.step_tokens)
        optimizer.step()
        optimizer.zero_grad()
        history.append((loss.item() / targets, norm.item(), targets))
        weights = {name: p.detach() for name, p in model.named_parameters()}
        updates = {name: weight - earlier[name] for name, weight in weights.items()}
        figures["grad_norm"] = by_layer(gradients, lambda values: values.norm())
        figures["parameter_rms"] = by_layer(weights, lambda values: values.square().mean().sqrt())
        figures["update_rms"] = by_layer(updates, lambda values: values.square().mean().sqrt())
        named = {id(p): name for name, p in model.named_parameters()}
        of_groups = {group["name"]: [gradients[named[id(p)]].flatten() for p in group["params"]] for group in groups}
        norms = {name: float(torch.cat(of_group).double().norm()) for name, of_group in of_groups.items()}
        layers[state.step] = Figures(figures, norms)
    return np.array(history), {name: p.detach().numpy() for name, p in model.named_parameters()}, layers


def by_layer(tensors: dict[str, torch.Tensor], figure) -> dict[str, float]:
    """Of all the parameters of a layer together, by the name of the layer."""
    parts = {}
    for name, tensor in tensors.items():
        layer = ".".join(name.split(".")[:2]) if name.startswith("layers.") else name.split(".")[0]
        parts.setdefault(layer, []).append(tensor.double().flatten())
    return {layer: float(figure(torch.cat(of_layer))) for layer, of_layer in parts.items()}


@contextlib.contextmanager
def watched(model: Llama, row: int):
    """What the layers hand on and attend to in a forward pass, by definition; all scores of one row are held."""
    figures = {"activation_rms": {}, "max_attention_logit": {}}
    hooks = []

    def attending(layer, q, k, v, documents, visibility):
        tokens = len(q[row])
        of_row = documents.tokens().at(slice(row * tokens, (row + 1) * tokens))
        k_of_heads = k[row].repeat_interleave(q.shape[2] // k.shape[2], 1)
        scores = torch.einsum("qhd,khd->hqk", q[row].double(), k_of_heads.double()) / q.shape[3] ** 0.5
        sees = visibility.sees(of_row.at((slice(None), None)), of_row)
        figures["max_attention_logit"][layer] = float(scores[:, sees].detach().max())
        return attend(q, k, v, documents, visibility)

    def hand_on(layer, module, inputs, out):
        figures["activation_rms"][layer] = float(out.detach().double().square().mean().sqrt())

    for entry in layer_plan(model.config):
        if entry.cls is not Head:
            layer = model.get_submodule(entry.name)
            hooks.append(layer.register_forward_hook(partial(hand_on, entry.name)))
        if entry.cls is Block:
            model.get_submodule(entry.name).self_attn.attend = partial(attending, entry.name)
    yield figures
    for hook in hooks:
        hook.remove()
