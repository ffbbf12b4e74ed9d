"""What a run reports: console, `metrics.jsonl`, Weights & Biases and TensorBoard, all fed with the same records.

Only the first rank writes; on the others the logger is the same object without outputs, so the training loop has no
special cases.
"""

import contextlib
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from training.goodput import share_of
from training.records import RecordFile, read_records
from training.sections import MetricsConfig
from training.wandb_run import WandbRun

if TYPE_CHECKING:
    from training.throughput import Rates

METRICS_FILE, LAYERS_FILE = "metrics.jsonl", "layers.jsonl"


class Sink(Protocol):
    """Takes each record of a run once, in order, and then the exit code."""

    def write(self, record: dict[str, Any]) -> None: ...
    def go_back(self, step: int) -> None: ...
    def close(self, exit_code: int) -> None: ...


class MetricsLogger:
    """Takes plain Python numbers and writes them everywhere."""

    def __init__(
        self,
        run_dir: Path,
        config: MetricsConfig,
        *,
        is_first_rank: bool,
        total_steps: int,
        resumed_step: int = 0,
        run_id: str,
        facts: dict[str, Any],
        peak_label: str = "mfu",
        wandb_mode: str | None = None,
    ) -> None:
        """Opens the outputs of a run that continues after `resumed_step` (0: a new one).

        Args:
            run_id: W&B's id of the run, the same after every restart.
            facts: everything that determines the run (resolved recipe, DeepSpeed JSON, environment), JSON-able.
            peak_label: what the console calls the share of the peak rate (`PeakRate.label`).
            wandb_mode: the user's WANDB_MODE, None where it is not set.
        """
        self._config, self._total_steps = config, total_steps
        self._sinks: list[Sink] = []
        self._layer_sinks: list[Sink] = []
        """Those that take the statistics of layers; a file of their own among them, since they are long."""
        self._last: dict[str, Any] = {}
        self._best: dict[str, dict[str, Any]] = {}
        self._speeds: list[float] = []
        if is_first_rank:
            self._sinks.append(Console(total_steps, peak_label))
            self._sinks.append(RecordFile(run_dir / METRICS_FILE, resumed_step))
            if config.layer_statistics_every_steps or (run_dir / LAYERS_FILE).exists():
                self._layer_sinks.append(RecordFile(run_dir / LAYERS_FILE, resumed_step))
            if config.wandb and wandb_mode != "disabled":
                files = [run_dir / name for name in (METRICS_FILE, LAYERS_FILE)]
                records = [record for file in files if file.exists() for record in read_records(file)]
                earlier = sorted(records, key=lambda record: record["step"])
                self._open(WandbRun(run_dir, config, run_id, facts, wandb_mode, earlier))
            if config.tensorboard:
                from training.tensorboard_run import TensorBoardRun

                self._open(TensorBoardRun(run_dir, resumed_step))

    def _open(self, sink: Sink) -> None:
        """One that takes everything."""
        self._sinks.append(sink)
        self._layer_sinks.append(sink)

    def due(self, step: int) -> bool:
        """Whether the metrics of this step are to be collected; the same on all ranks."""
        return step % self._config.log_every_steps == 0 or step in (1, self._total_steps)

    def log_step(
        self,
        step: int,
        *,
        samples: int,
        tokens: int,
        loss: float,
        objective: float,
        learning_rate: float,
        grad_norm: float | None,
        skipped_steps: int,
        rates: "Rates",
        attention_imbalance: float = 0.0,
        memory_bytes: int | None = None,
        wire_bytes: int | None = None,
        adapters: Mapping[str, Any] | None = None,
        wall_seconds: Mapping[str, float] | None = None,
    ) -> None:
        """Reports one optimizer step.

        Args:
            step: number of this step; the first is 1.
            samples: rows used since the beginning of the run, all ranks together; likewise `tokens`.
            loss: mean cross entropy per target, in nats; `objective` is what was minimised (with z-loss, for example).
            grad_norm: global norm before clipping.
            skipped_steps: steps not applied since the beginning of the run.
            attention_imbalance: how much more attention the busiest rank had in this step than the average one, as a share.
            wire_bytes: what the first rank handed to the calls of a compressed reduction; left out where there is none.
            adapters: further figures by name: see `engine.survey.figures`.
            wall_seconds: where the time of the run went, by kind, over all launches: see `training.goodput`.
        """
        record = {
            "samples": samples,
            "tokens": tokens,
            "loss": loss,
            "objective": objective,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "skipped_steps": skipped_steps,
            **rates._asdict(),
            "attention_imbalance": attention_imbalance,
            "memory_bytes": memory_bytes,
            "eta_seconds": (self._total_steps - step) * rates.step_seconds,
        }
        if wire_bytes is not None:
            record["wire_bytes"] = wire_bytes
        record |= adapters or {}
        if wall_seconds is not None:
            record["goodput"] = round(share_of(wall_seconds), 4)
            record["wall_seconds"] = {kind: round(seconds, 3) for kind, seconds in wall_seconds.items()}
        self._last = {"step": step, **record}
        self._speeds.append(rates.tokens_per_second)
        self._write(step, record)

    def log_layers(
        self, step: int, layers: Mapping[str, Mapping[str, float]], groups: Mapping[str, float] | None = None
    ) -> None:
        """Reports what layers and groups of parameters were like at a step: see `engine.layer_statistics.Figures`."""
        rounded = {kind: {name: _rounded(value) for name, value in of.items()} for kind, of in layers.items()}
        of_groups = {name: _rounded(value) for name, value in (groups or {}).items()}
        record = {"step": step, "layers": rounded, "groups": of_groups, "time": round(time.time(), 3)}
        for sink in self._layer_sinks:
            sink.write(record)

    def log_validation(self, step: int, results: dict[str, dict[str, Any]]) -> None:
        """Reports the validation after `step`: for each set `loss` (nats per target), `bits_per_byte`, `targets`, and
        `loss_by_source` where there are several."""
        for name, scores in results.items():
            if not self._best.get(name, {}).get("loss", math.inf) <= scores["loss"]:
                self._best[name] = {"step": step, **scores}
        self._write(step, {"validation": results})

    def log_event(self, step: int, event: str, **details: Any) -> None:
        """Reports something that happened after `step`; details are JSON-able.

        The report marks `resume`, `checkpoint` and `skip`; W&B shows a run as preempted, not failed, after a `stop`.
        """
        self._write(step, {"event": event, **details})

    def say(self, step: int, text: str) -> None:
        """On the console alone."""
        for sink in self._sinks:
            if isinstance(sink, Console):
                sink.say(step, text)

    def go_back(self, step: int) -> None:
        """The steps after this one will be done, and reported, again."""
        for sink in dict.fromkeys([*self._sinks, *self._layer_sinks]):
            sink.go_back(step)

    def summary(self) -> dict[str, Any]:
        """The last logged step, the median speed, and the best validation of each set, of this launch."""
        if not self._last:
            return {"step": 0, "best_validation": self._best}
        keys = ("step", "samples", "tokens", "loss", "objective", "skipped_steps")
        speed = statistics.median(self._speeds)
        return {key: self._last[key] for key in keys} | {"tokens_per_second": speed, "best_validation": self._best}

    def close(self, exit_code: int = 0) -> None:
        """Finishes the outputs; W&B shows a run with another exit code as failed. A second call does nothing."""
        sinks, self._sinks, self._layer_sinks = dict.fromkeys([*self._sinks, *self._layer_sinks]), [], []
        for sink in sinks:
            sink.close(exit_code)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(0 if kind is None else 1)

    def _write(self, step: int, values: dict[str, Any]) -> None:
        for sink in self._sinks:
            sink.write({"step": step, **values, "time": round(time.time(), 3)})


class Console:
    """One aligned line per record on standard output; a reader who has gone, a launcher perhaps, does not end the run."""

    def __init__(self, total_steps: int, peak_label: str) -> None:
        self._total_steps, self._peak_label = total_steps, peak_label
        self._step_width = len(str(total_steps))

    def write(self, record: dict[str, Any]) -> None:
        cells: list[str] = []
        if "validation" in record:
            cells += [_validation_cell(name, scores) for name, scores in record["validation"].items()]
        elif "event" in record:
            details = {key: value for key, value in record.items() if key not in ("step", "event", "time")}
            cells.append(" ".join([record["event"], *(f"{key}={_short(value)}" for key, value in details.items())]))
        else:
            cells += self._metrics_cells(record)
        self.say(record["step"], *cells)

    def say(self, step: int, *cells: str) -> None:
        with contextlib.suppress(BrokenPipeError):
            print(" | ".join([f"step {step:>{self._step_width}}/{self._total_steps}", *cells]), flush=True)

    def go_back(self, step: int) -> None:
        """What was printed stays."""

    def close(self, exit_code: int) -> None:
        """Nothing to close."""

    def _metrics_cells(self, record: dict[str, Any]) -> Sequence[str]:
        norm = record["grad_norm"]
        cells = [
            f"loss {record['loss']:7.4f}",
            f"lr {record['learning_rate']:.2e}",
            f"norm {'-' if norm is None else format(norm, '.3f'):>7}",
            f"{with_prefix(record['tokens_per_second']):>6} tok/s",
            f"{self._peak_label} {record['mfu']:6.1%}",
            f"wait {record['data_wait_fraction']:6.1%}",
            f"eta {timedelta(seconds=round(record['eta_seconds']))}",
        ]
        return cells + ([f"skipped {record['skipped_steps']}"] if record["skipped_steps"] else [])


def with_prefix(number: float) -> str:
    """1234567 as "1.23M": three significant digits and a decimal prefix."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            return f"{number / size:#.3g}".rstrip(".") + prefix
    return f"{number:.3g}"


def _validation_cell(name: str, scores: dict[str, float]) -> str:
    bits = scores.get("bits_per_byte")
    return f"{name} loss {scores['loss']:.4f}" + ("" if bits is None else f" ({bits:.4f} bits/byte)")


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
