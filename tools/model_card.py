"""The model card of an export: what the model is, what it saw, how well it predicts, and what made it."""

from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from model.adapter_config import AdaptersConfig
from model.config import ModelConfig
from model.merge_ways import WAYS, Choice
from storage.manifest import TokenizerInfo
from training.metrics import METRICS_FILE
from training.records import read_records

if TYPE_CHECKING:
    from engine.checkpoint.manifest import CheckpointManifest
    from tools.hf_tokenizer import Written

CARD = Template("""---
library_name: transformers
pipeline_tag: $task
tags: [llama, deepspeed, longform]
---

# $name

A $architecture with $parameters parameters, trained with DeepSpeed for $steps optimizer steps on $tokens tokens.$merged

$usage
$beginning Rows held $seq_length tokens; attention did not cross document boundaries.

## Data

Fingerprint `$fingerprint`

| source | documents | bytes of text | tokens | tokens a row |
|---|---|---|---|---|
$sources

## Validation

$validation

## Run

| | |
|---|---|
| seed | $seed |
| optimizer | $optimizer, peak learning rate $lr, weight decay $weight_decay |
| checkpoint | `$checkpoint`, written $created |
| git commit | $commit |
| versions | $versions |
""")
MERGED = Template("""
What was trained are low-rank adapters, of which these are part of the matrices here, each times its share: $names.""")
MIXTURE = Template("""
It holds low-rank adapters, which all read a text; the probabilities of the next token are theirs, mixed by weights that begin
as $prior and follow from what the text has said so far, of which $evidence is kept from token to token. The logits are
logarithms of the mixed probabilities. `modeling_mixture.py` in this folder is the code that `trust_remote_code` runs.""")
MERGED_BY = Template("""
What was trained are low-rank adapters, here merged by PEFT's way `$way` with the weights $weights$options. What that and other
ways cost, in bits per byte on each source:

$costs
""")
ADAPTERS = Template("""# $name

Low-rank adapters that were trained together for $steps optimizer steps, each in a folder of its own:$merged

$names

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("$base")
model = PeftModel.from_pretrained(base, "$folder/$first")
```

## Validation

$validation
""")
NEXT_TOKEN = Template("""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("$folder"$trust)
model = AutoModelForCausalLM.from_pretrained("$folder"$trust_model)
```
""")
MASKED = Template("""```python
from transformers import AutoModelForMaskedLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("$folder", trust_remote_code=True)
model = AutoModelForMaskedLM.from_pretrained("$folder", trust_remote_code=True)
text = f"To be, or {tokenizer.mask_token} to be"
inputs = tokenizer(text, return_tensors="pt")
logits = model(**inputs).logits  # at each token those of the token itself, not of the next one
```

It was trained to predict $share, replaced by the mask token (id $mask_id), from $context.
`modeling_longform.py` in this folder is the code that `trust_remote_code` runs; $without_it. To let the model
write a text: `python -m tools.generate $folder --prompt "..."`, a command of the repository that trained it.
""")
BEGINNING = "Every document of the training began with the BOS token, which the tokenizer adds by itself."
NOT_ADDED = "Every document of the training began with the BOS token, which the tokenizer leaves to you (`tokenizer.bos_token`)."
TRUST = ", trust_remote_code=True"


def card(
    run: Path,
    checkpoint: Path,
    manifest: "CheckpointManifest",
    config: ModelConfig,
    output: Path,
    tokenizer: "Written",
    adapters: str = "",
) -> str:
    """The model card: what the model is, what it saw, how well it predicts, and what made it. `adapters`: what became of them."""
    data, recipe, state = manifest.data, manifest.recipe, manifest.state
    trained = [stage for stage in data.get("stages", [data]) if stage.get("first_step", 1) <= state.step]
    sets = list({stage["fingerprint"]: stage for stage in trained}.values())
    rows = [
        f"| {name} | {source['documents']:,} | {source['bytes']:,} | {source['tokens']:,} | {part['seq_length']:,} |"
        for part in sets
        for name, source in part["sources"].items()
    ]
    return CARD.substitute(
        name=output.name,
        task="text-generation" if config.is_causal else "fill-mask",
        merged=adapters,
        usage=_usage(manifest, config, output.name, tokenizer),
        architecture=config.to_hf()["architectures"][0],
        parameters=f"{config.num_parameters():,}",
        steps=f"{state.step:,}",
        tokens=f"{state.consumed_tokens:,}",
        beginning=(BEGINNING if tokenizer.adds_bos else NOT_ADDED)
        if data["tokenizer"]["bos_id"] is not None
        else "Documents have no BOS token.",
        seq_length=", then ".join(f"{part['seq_length']:,}" for part in sets),
        fingerprint="`, then `".join(part["fingerprint"] for part in sets),
        sources="\n".join(rows),
        validation=validation_table(run, state.step),
        seed=state.seed,
        optimizer={"adamw": "AdamW", "lion": "Lion", "muon": "Muon", "normuon": "NorMuon"}[recipe["optimizer"]["name"]],
        lr=recipe["optimizer"]["lr"],
        weight_decay=recipe["optimizer"]["weight_decay"],
        checkpoint=checkpoint.name,
        created=manifest.created,
        commit=(manifest.environment.get("git") or {}).get("commit", "unknown"),
        versions=", ".join(
            f"{name} {version}" for name, version in manifest.environment["packages"].items() if version
        ),
    )


def merged(shares: Mapping[str, float]) -> str:
    """What a card says of adapters that are added to the matrices."""
    return MERGED.substitute(names=", ".join(f"{name} ({share:g})" for name, share in shares.items()))


def merged_by(way: str, weights: str, choice: Choice, costs: Mapping[str, Mapping[str, float]]) -> str:
    """What a card says of adapters that became one; `costs`: the table that was shown."""
    kind, options = WAYS[way], ""
    if kind.prune:
        options += f", density {choice.density:g}" + f", seed {choice.seed}" * (kind.prune == "random")
    if kind.elects:
        options += f", signs by {choice.majority_sign}"
    lines = [["", *next(iter(costs.values()))], ["---"] * (1 + len(next(iter(costs.values()))))]
    lines += [[name, *(f"{value:.4f}" for value in row.values())] for name, row in costs.items()]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return MERGED_BY.substitute(way=way, weights=weights, options=options, costs=table)


def mixture(adapters: AdaptersConfig) -> str:
    """What a card says of adapters that are mixed."""
    prior = ", ".join(
        f"{name} ({share:.3g})" for name, share in zip(adapters.names, adapters.prior_shares, strict=True)
    )
    return MIXTURE.substitute(prior=prior, evidence="all" if adapters.evidence == 1 else f"{adapters.evidence:g}")


def _usage(manifest: "CheckpointManifest", config: ModelConfig, folder: str, tokenizer: "Written") -> str:
    from tools.trained import objective_of
    from training.objective import mask_token_id

    if config.is_causal:
        of_model = TRUST if config.adapters.members else ""
        of_tokenizer = TRUST if tokenizer.own_code else of_model  # for which transformers looks into config.json, too
        return NEXT_TOKEN.substitute(folder=folder, trust=of_tokenizer, trust_model=of_model)
    objective = objective_of(manifest)
    low, high = objective.ratios
    share = f"a share of the tokens drawn from [{low:g}, {high:g}]" if objective.drawn else f"{high:.0%} of the tokens"
    context = "all other tokens of their document"
    without_it = "`AutoModelForCausalLM` of transformers 5.2 or newer gives the same logits without it"
    if config.chunk_size is not None:
        context = f"their own chunk of {config.chunk_size} tokens and all earlier ones of their document"
        without_it = "nothing in transformers computes the same"
    return MASKED.substitute(
        folder=folder,
        share=share,
        mask_id=mask_token_id(TokenizerInfo.model_validate(manifest.data["tokenizer"]), config),
        context=context,
        without_it=without_it,
    )


def validation_table(run: Path, step: int) -> str:
    """The last one until `step`, in Markdown."""
    metrics = run / METRICS_FILE
    records = [
        r for r in (read_records(metrics) if metrics.exists() else []) if "validation" in r and r["step"] <= step
    ]
    if not records:
        return "None was made during the run."
    rows = [
        f"| {name} | {records[-1]['step']} | {s['loss']:.4f} | "
        + (f"{s['bits_per_byte']:.4f} |" if "bits_per_byte" in s else "|")
        for name, s in records[-1]["validation"].items()
    ]
    return "\n".join(["| set | step | loss (nats per token) | bits per byte |", "|---|---|---|---|", *rows])
