"""Weights & Biases: one run per training run, on the first rank only, the same one again after every restart.

Without a key the run is recorded offline under `RUN/wandb` (`wandb sync` uploads it, `wandb beta leet` shows it in the
terminal). Every row says its optimizer step in `progress/step`, over which the curves are drawn. W&B's own step is the same
until the run goes back after a spike, since W&B takes no step back: what is done again has rows of its own after those that
were dropped, and is what is shown last for its step. After a resume, rows that W&B has already seen are not sent again: the
resume is exact, so they would be the same numbers. Rows that it lost in a kill are sent first.
"""

import logging
import os
import socket
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from training.records import finite
from training.wandb_files import mend_files

if TYPE_CHECKING:
    import wandb

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
ADAPTER_KEYS = {
    "adapter_losses": "loss",
    "adapter_shares": "share",
    "adapter_shares_of_sources": "share",
    "adapter_prior": "prior",
}
STEP_KEY = "progress/step"
VALIDATION_KEYS = ("loss", "bits_per_byte")
ANSWER_SECONDS, CONNECT_SECONDS, FINISH_SECONDS = 3.0, 10.0, 15.0
"""For W&B's server: to accept a connection, to know the run, and to take at the end what it has not taken yet."""


def _of_adapters(kind: str, values: dict[str, Any], of: str = "") -> dict[str, float]:
    """Figures by adapter, or by source and adapter."""
    found: dict[str, float] = {}
    for name, value in values.items():
        more = (
            _of_adapters(kind, value, f"_of/{name}")
            if isinstance(value, dict)
            else {f"adapters/{name}/{kind}{of}": value}
        )
        found |= more
    return found


def wandb_values(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of one record of a run under their W&B keys; an event becomes a 1 in `events/<name>`."""
    values = {f"plan/{key}": value for key, value in record.items() if key.startswith(("planned_", "measured_"))}
    if "event" in record:
        values[f"events/{record['event']}"] = 1
    elif "layers" in record:
        of_groups = {f"groups/grad_norm/{name}": value for name, value in record.get("groups", {}).items()}
        kinds = record["layers"].items()
        values = of_groups | {f"layers/{kind}/{name}": value for kind, of in kinds for name, value in of.items()}
    elif "validation" in record:
        sets = record["validation"].items()
        values = {f"validation/{name}/{key}": scores.get(key) for name, scores in sets for key in VALIDATION_KEYS}
        for name, scores in sets:
            by_source = scores.get("loss_by_source", {})
            values |= {f"validation/{name}/loss_by_source/{source}": loss for source, loss in by_source.items()}
    else:
        values |= {key: record[name] for name, key in WANDB_KEYS.items()}
        for key, kind in ADAPTER_KEYS.items():
            values |= _of_adapters(kind, record.get(key, {}))
        if "effective_adapters" in record:
            values["adapters/effective"] = record["effective_adapters"]
        if "goodput" in record:
            values["goodput/share"] = record["goodput"]
            values |= {f"goodput/{kind}_seconds": seconds for kind, seconds in record["wall_seconds"].items()}
    return {key: value for key, value in finite(values).items() if value is not None}


def wandb_row(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a record and the optimizer step that they are of: of a spike, the one that was refused."""
    return wandb_values(record) | {STEP_KEY: record.get("spike_step", record["step"])}


class WandbRun:
    """Sends records to one W&B run; whatever W&B does, training goes on, and a fault of it is said once.

    A row of W&B is closed by the row of a later step. What comes later for a closed row, as the event of a resume, goes
    into the next row; what a closed row already has is not sent again.
    """

    def __init__(
        self,
        run_dir: Path,
        config: "MetricsConfig",
        run_id: str,
        facts: dict[str, Any],
        mode: str | None,
        earlier: Sequence[dict[str, Any]] = (),
    ) -> None:
        """`facts` becomes the run's config. `mode` is W&B's own (online, offline ...); None: online if there is a key.

        Of the `earlier` records of the run, those that W&B lacks after a kill are sent first. A server that cannot be
        reached is no reason not to train: the run is then recorded offline.
        """
        self._run: wandb.Run | None = None
        self._carried: dict[str, float] = {}
        self._dropped = 0
        """Steps that were done, and then dropped when the run went back."""
        self._closed = -1
        try:
            self._rows = mend_files(run_dir / "wandb", run_id)
            with _without_stderr():
                self._run, notice = _open_run(run_dir, config, run_id, facts, mode)
                self._run.define_metric("*", step_metric=STEP_KEY)
            if notice:
                print(f"warning: {notice}", file=sys.stderr)
            self._folder = Path(self._run.settings.sync_dir)
            if self._run.resumed:
                self._closed = self._run.starting_step - 1
            else:  # a server that does not know the run lacks what is in files, too
                self._closed = max(self._rows, default=-1) if self._run.offline else -1
        except Exception as error:
            self._give_up(error)
        for record in earlier:
            self._send(record, self._closed)

    def write(self, record: dict[str, Any]) -> None:
        self._send(record)
        if self._run and record.get("event") == "stop":
            try:
                self._run.mark_preempting()  # shown as preempted, not failed, when it ends with another code than 0
            except Exception as error:
                self._give_up(error)

    def _send(self, record: dict[str, Any], first: int = 0) -> None:
        """Into its row, if that is not before the row `first`."""
        if self._run is None:
            return
        values = wandb_row(record)
        row = int(values[STEP_KEY]) + self._dropped
        self._dropped = row - record["step"]
        try:
            if row > self._closed:
                self._run.log(self._carried | values, step=row)
                self._carried = {}
            elif row >= first and row in self._rows:
                late = {key: value for key, value in values.items() if key not in self._rows[row]}
                self._carried |= late and late | {STEP_KEY: values[STEP_KEY]}
        except Exception as error:
            self._give_up(error)

    def go_back(self, step: int) -> None:
        """Rows that are closed stay; those to come follow from the record of the spike."""

    def close(self, exit_code: int) -> None:
        """Wait a while for W&B to take the rest; what it does not take then, the next launch sends."""
        try:
            if self._run and self._carried:
                self._run.log(self._carried, step=self._closed + 1)
            if self._run:
                self._run.finish(exit_code)
        except TimeoutError:
            text = f"warning: W&B's server has not taken everything within {FINISH_SECONDS:g} s; the next launch sends what it "
            print(text + f"lacks, or: wandb sync {self._folder}", file=sys.stderr)
        except Exception as error:
            self._give_up(error)
        if self._run is None:
            _forget_service()

    def _give_up(self, error: Exception) -> None:
        """W&B's client raises errors of every kind where its service has died or a disk is full."""
        self._run = None
        text = f"warning: W&B records nothing from here on ({_one_line(error)}); the next launch sends what it lacks"
        print(text, file=sys.stderr)


def _open_run(
    run_dir: Path, config: "MetricsConfig", run_id: str, facts: dict[str, Any], mode: str | None
) -> tuple["wandb.Run", str | None]:
    """The run, and what to tell the user of it, if anything."""
    import wandb

    logging.getLogger("asyncio").setLevel(logging.ERROR)  # or it says eight times that the service has died

    # What the user's environment and W&B settings files say; silent, or a login asks the server whom to greet.
    defaults = wandb.setup(wandb.Settings(quiet=True, silent=True)).settings
    seconds: dict[str, Any] = {
        "init_timeout": CONNECT_SECONDS,
        "finish_timeout": FINISH_SECONDS,
        "finish_timeout_raises": True,
    }
    identity: dict[str, Any] = {
        "id": run_id,
        "resume": "allow",
        "entity": config.wandb_entity or defaults.entity,
        "project": config.wandb_project or defaults.project or "longform",
        "name": config.wandb_name or defaults.run_name or run_dir.resolve().name,
        "group": config.wandb_group or defaults.run_group,
        "tags": [*config.wandb_tags] or defaults.run_tags,
        "config": finite(facts),
        "dir": run_dir,
        "settings": wandb.Settings(quiet=True, silent=True, **seconds),
    }
    try:
        if mode is None:
            mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
        if mode == "online" and not defaults.http_proxy and not defaults.https_proxy:
            knock_at(defaults.base_url)
        return wandb.init(**identity | {"mode": mode}), None
    except (wandb.Error, OSError) as error:
        wandb.teardown()  # the run that did not start still has the name
        notice = f"W&B is not available ({_one_line(error)}); recording offline under {run_dir}/wandb"
        return wandb.init(**identity, mode="offline"), notice


def knock_at(address: str) -> None:
    """Raises OSError where nothing accepts a connection at this URL, for which W&B itself would wait much longer.

    What a proxy can reach is not known here: where one is set, nothing is tried.
    """
    if urllib.request.getproxies():
        return
    url = urlsplit(address)
    try:
        socket.create_connection((url.hostname, url.port or socket.getservbyname(url.scheme)), ANSWER_SECONDS).close()
    except OSError as error:
        raise OSError(f"no server at {address}: {error.strerror or error}") from None


def _forget_service() -> None:
    """Or W&B says goodbye to a service that has died when the process ends, in thirty lines."""
    import wandb

    with suppress(Exception), _without_stderr():
        wandb.teardown()


@contextmanager
def _without_stderr() -> Iterator[None]:
    """W&B's service inherits standard error for good, and logs there where it cannot write to HOME."""
    sys.stderr.flush()
    kept = os.dup(2)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
