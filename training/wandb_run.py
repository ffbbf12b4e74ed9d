"""Weights & Biases: one run per training run, on the first rank only, the same one again after every restart.

Without a key the run is recorded offline under `RUN/wandb` (`wandb sync` uploads it, `wandb beta leet` shows it in the
terminal). W&B's own step is the optimizer step. After a resume, steps that W&B has already seen are not sent again: the
resume is exact, so they would be the same numbers.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.records import finite

if TYPE_CHECKING:
    from training.sections import MetricsConfig

# Record key -> W&B key; the part before the slash is the section of the dashboard.
WANDB_KEYS = {
    "loss": "train/loss",
    "objective": "train/objective",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "skipped_steps": "train/skipped_steps",
    "tokens_per_second": "speed/tokens_per_second",
    "mfu": "speed/mfu",
    "step_seconds": "speed/step_seconds",
    "data_wait_fraction": "speed/data_wait_fraction",
    "attention_imbalance": "speed/attention_imbalance",
    "memory_bytes": "speed/memory_bytes",
    "tokens": "progress/tokens",
    "samples": "progress/samples",
    "eta_seconds": "progress/eta_seconds",
}
VALIDATION_KEYS = ("loss", "bits_per_byte")


def wandb_values(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of one record of `metrics.jsonl` under their W&B keys; an event becomes a 1 in `events/<name>`."""
    if "event" in record:
        return {f"events/{record['event']}": 1}
    if "validation" in record:
        sets = record["validation"].items()
        values = {f"validation/{name}/{key}": scores.get(key) for name, scores in sets for key in VALIDATION_KEYS}
    else:
        values = {key: record[name] for name, key in WANDB_KEYS.items()}
    return {key: value for key, value in finite(values).items() if value is not None}


class WandbRun:
    """Sends records to one W&B run."""

    def __init__(self, run_dir: Path, config: "MetricsConfig", run_id: str, facts: dict[str, Any], mode: str | None):
        """`facts` becomes the run's config. `mode` is W&B's own (online, offline ...); None: online if there is a key.

        A server that cannot be reached is no reason not to train: the run is then recorded offline.
        """
        import wandb

        defaults = wandb.setup().settings  # what the user's environment and W&B settings files say
        identity = {
            "id": run_id,
            "resume": "allow",
            "entity": config.wandb_entity or defaults.entity,
            "project": config.wandb_project or defaults.project or "longform",
            "name": config.wandb_name or defaults.run_name or run_dir.resolve().name,
            "group": config.wandb_group or defaults.run_group,
            "tags": [*config.wandb_tags] or defaults.run_tags,
            "config": finite(facts),
            "dir": run_dir,
            "settings": wandb.Settings(quiet=True),
        }
        try:
            if mode is None:
                mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
            self._run = wandb.init(**identity, mode=mode)
        except wandb.Error as error:
            print(f"warning: W&B is not available ({error}); recording offline under {run_dir}/wandb", file=sys.stderr)
            self._run = wandb.init(**identity, mode="offline")

    def write(self, record: dict[str, Any]) -> None:
        if record["step"] >= self._run.step:
            self._run.log(wandb_values(record), step=record["step"])
        if record.get("event") == "stop":
            self._run.mark_preempting()  # shown as preempted, not as failed, when it ends with another exit code than 0

    def close(self, exit_code: int) -> None:
        self._run.finish(exit_code)
