"""The commands behind a task: tokenizer, data, a small base, and adapters on it. What a work folder has is not made again."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from console.progress import say
from storage.atomic import write_atomically

RECIPES = Path("recipes/tasks")
ARROW = "\n=>"
TEMPLATE = """{%- for message in messages %}
{%- if message['role'] == 'user' %}{{- message['content'] + '\\n=>' }}
{%- else %}{% generation %}{{- ' ' + message['content'] + eos_token }}{% endgeneration %}{%- endif %}
{%- endfor %}"""
"""A question, an arrow, its answer and the end."""
TOGETHER_TOKENS = 4096
"""Of the rows of a micro-batch."""
AT_ONCE = 2
"""Trainings side by side: each is small enough for one core."""


class Settings(NamedTuple):
    """How big and how long everything in a work folder is."""

    base: str | None = None
    """A Hugging Face folder instead of a base of our own."""
    texts_bytes: int = 1_000_000
    """Of each domain."""
    vocab_size: int = 4096
    seq_length: int = 1024
    base_steps: int = 180
    adapter_steps: int = 60
    mixture_steps: int = 32
    grouped_rows: int = 512
    """Rows whose documents tell adapters apart that have no labels."""
    grouped_steps: int = 50
    seeds: int = 2
    answer_steps: int = 100
    search_steps: int = 60
    questions: int = 200
    """Of each kind, answered at the end."""


class Workshop:
    """A work folder."""

    def __init__(self, work: Path, settings: Settings) -> None:
        """Raises ValueError where the folder holds what other settings made, or something else."""
        self.work, self.settings = work, settings
        made = work / "settings.json"
        asked = json.dumps(settings._asdict(), indent=1)
        if made.exists() and made.read_text() != asked:
            raise ValueError(f"--work {work} was made with other settings ({made}): give another folder, or remove it")
        if not made.exists() and work.exists() and any(work.iterdir()):
            raise ValueError(f"--work {work} holds something else: give another folder")
        work.mkdir(parents=True, exist_ok=True)
        write_atomically(made, asked.encode())

    def tokenizer(self, texts: Sequence[Path]) -> Path:
        """That of the base, with a chat template."""
        folder = self.work / "tokenizer"
        if not (folder / "chat_template.jinja").exists():
            shutil.rmtree(folder, ignore_errors=True)
            if self.settings.base is not None:
                shutil.copytree(self.settings.base, folder, ignore=shutil.ignore_patterns("*.safetensors*", "*.bin"))
            else:
                words = ["--vocab-size", self.settings.vocab_size, "--character-coverage", 0.98]
                train = ["data_prep.tokenizer", "train", "--input", *texts, *words]
                self._run(f"tokenizer of {self.settings.vocab_size:,} entries", ["-m", *train, "--output", folder])
            write_atomically(folder / "chat_template.jinja", TEMPLATE.encode())
        return folder

    def data(self, name: str, texts: Sequence[Path], *flags: Any) -> Path:
        """A data set of the sources that the files are called after."""
        folder = self.work / "data" / name
        if not (folder / "manifest.json").exists():
            sources = [word for path in texts for word in ("--source", f"{path.stem}={path}")]
            how = ["--tokenizer", self.work / "tokenizer", "--seq-length", self.settings.seq_length, "--id-field", "id"]
            self._run(f"data: {name}", ["-m", "data_prep.build", *sources, *how, *flags, "--output", folder])
        return folder

    def base(self, data: Path) -> Path:
        """The Hugging Face folder of the base."""
        if self.settings.base is not None:
            return Path(self.settings.base)
        (run,) = self.trainings({"base": Training(data, RECIPES / "base.yaml", self.settings.base_steps)})
        return self.exported(run, self.work / "base")

    def exported(self, run: Path, folder: Path, *flags: str) -> Path:
        """What tools.export makes of a run, in `folder`."""
        if not folder.exists():
            words = [run, "--output", folder, "--dtype", "float32", *flags]
            self._run(f"export of {run.name}", ["-m", "tools.export", *words])
        return folder

    def trainings(self, wanted: Mapping[str, Training]) -> list[Path]:
        """The folders of runs, by their names and in their order; some run side by side."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(self._train, wanted, wanted.values()))

    def _train(self, name: str, training: Training) -> Path:
        run = self.work / "runs" / name
        if not (run / "checkpoints" / f"step-{training.steps:08d}").exists():
            recipe = self.work / "recipes" / f"{name}.yaml"
            recipe.parent.mkdir(exist_ok=True)
            write_atomically(recipe, yaml.safe_dump(training.recipe(self.settings)).encode())
            paths = ["--recipe", recipe, "--deepspeed_config", f"ds_configs/{precision()}.json"]
            words = [*paths, "--data", training.data, "--output", run]
            self._run(f"training: {name}, {training.steps} steps", ["train.py", *words])
        return run

    def _run(self, what: str, words: Sequence[Any]) -> None:
        """One of our commands, its output in work/logs."""
        log = self.work / "logs" / f"{what.split(',')[0].replace(': ', '-').replace(' ', '-')}.log"
        log.parent.mkdir(exist_ok=True)
        command = [str(word) for word in words]
        say(f"{what}: python {shlex.join(command)} > {log}")
        with log.open("wb") as output:
            code = subprocess.run([sys.executable, *command], stdout=output, stderr=subprocess.STDOUT).returncode
        if code:
            last = log.read_text(errors="replace").strip().splitlines()[-1:]
            raise ValueError(f"{what} failed with exit code {code}, see {log}: {' '.join(last)}")


class Training(NamedTuple):
    """A run of train.py."""

    data: Path
    recipe_file: Path
    steps: int
    adapters: Mapping[str, Any] = {}
    """Of the recipe's section, beside what the file has."""
    base: Path | None = None
    seed: int = 0

    def recipe(self, settings: Settings) -> dict[str, Any]:
        """What the file has, and what is this run's alone."""
        tree = yaml.safe_load(self.recipe_file.read_text(encoding="utf-8"))
        tokens = tree["training"]["global_batch_tokens"]
        if "objective" not in tree:  # else all pairs of a step are compared
            tokens = min(tokens, TOGETHER_TOKENS)
        rows = max(1, tokens // settings.seq_length)
        tree["training"] |= {"max_steps": self.steps, "seed": self.seed, "micro_batch_samples": rows}
        if self.base is None:
            tree["model"]["vocab_size"] = settings.vocab_size
            tree["schedule"]["decay_steps"] = max(1, self.steps // 3)
        else:
            tree["model"] = {"config_json": str(self.base / "config.json")}
            tree["training"]["initial_weights"] = str(self.base)
            tree["adapters"] |= self.adapters
        tree["schedule"]["warmup_steps"] = min(tree["schedule"]["warmup_steps"], max(1, self.steps // 4))
        tree["checkpoint"] = {"every_steps": self.steps}
        return tree


def precision() -> str:
    """Of the DeepSpeed JSON: float32 on a CPU, which every CPU computes fast."""
    import torch  # seconds, which --help does without

    return "zero2" if torch.cuda.is_available() else "zero2_fp32"
