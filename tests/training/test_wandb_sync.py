"""What `wandb sync` sends of a run that was killed and continued, and what a W&B that fails does to a run: nothing."""

import gzip
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.forks import run_python
from tests.processes import free_port, run_cli
from tests.properties import examples
from tests.training.test_metrics import log
from tests.training.test_wandb_run import FACTS, launch, read_run, records_of
from training import wandb_run
from training.metrics import METRICS_FILE, MetricsLogger
from training.records import read_records
from training.sections import MetricsConfig
from training.wandb_files import messages
from training.wandb_run import STEP_KEY, WandbRun, wandb_row

KEY = "0123456789" * 4
BUCKET = {
    "id": "r", "name": "kept1234", "displayName": "run", "description": "", "config": "{}", "sweepName": None,
    "historyLineCount": 0, "project": {"id": "p", "name": "longform", "entity": {"id": "e", "name": "me"}},
}  # fmt: skip
ANSWERS = {
    "viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}, "email": "me@here"},
    "serverInfo": {"cliVersionInfo": {"max_cli_version": "99"}, "features": [], "latestLocalVersionInfo": None},
    "upsertBucket": {"bucket": BUCKET, "inserted": True},
    "createRunFiles": {"runID": "r", "uploadHeaders": [], "files": []},
}


class Server(BaseHTTPRequestHandler):
    """As much of W&B's server as its client needs; the rows of the history that it gets are kept."""

    rows: list[dict[str, Any]]
    trouble: str

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
        data = {}
        if self.trouble == "slow":
            time.sleep(0.2)
        if self.path.endswith("/graphql"):
            query = json.loads(body)["query"]
            data = {"data": {name: answer for name, answer in ANSWERS.items() if name in query}}
            if "query RunResumeStatus" in query and self.rows:
                data["data"]["model"] = {"bucket": BUCKET | self.state()}
        elif self.path.endswith("/file_stream"):
            if self.trouble == "takes nothing":
                self.close_connection = True
                return
            history = json.loads(body).get("files", {}).get("wandb-history.jsonl", {"content": []})
            self.rows += map(json.loads, history["content"])
        answer = json.dumps(data).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_PUT = do_POST

    def state(self) -> dict[str, Any]:
        """What it knows of the run."""
        last = json.dumps(self.rows[-1])
        tails = {"historyTail": json.dumps([last]), "eventsTail": "[]", "summaryMetrics": last}
        counts = {"historyLineCount": len(self.rows), "eventsLineCount": 0, "logLineCount": 0}
        return tails | counts | {"tags": [], "notes": None, "wandbConfig": '{"t": 1}'}

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@contextmanager
def wandb_server(rows: list[dict[str, Any]] | None = None, trouble="") -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Its address, and the rows that it has and gets."""
    rows = [] if rows is None else rows
    handler = type("Recorder", (Server,), {"rows": rows, "trouble": trouble})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", rows
        server.shutdown()


def by_step(records: list[dict[str, Any]]) -> dict[int, dict[str, float]]:
    """What W&B has to show of records of a run."""
    expected: dict[int, dict[str, float]] = {}
    for record in records:
        expected.setdefault(record["step"], {}).update(wandb_row(record))
    return expected


def ended_launch(folder: str, last_step: int, end: str) -> None:
    """A launch that logs as the training loop does and is then killed with all its children, as the demo does it; or
    stops after a SIGTERM to all its processes, of which W&B's service dies at once.
    """
    logger = MetricsLogger(
        Path(folder), MetricsConfig(), is_first_rank=True, total_steps=6, run_id="kept1234", facts=FACTS,
    )  # fmt: skip
    for step in range(1, last_step + 1):
        log(logger, step)
    logger.log_validation(last_step, {"books": {"loss": 2.0, "bits_per_byte": 0.75, "targets": 9}})
    logger.log_event(last_step, "checkpoint", name="step-00000003")
    while not any(b"train/loss" in file.read_bytes() for file in Path(folder).glob("wandb/offline-*/*.wandb")):
        time.sleep(0.05)  # W&B's service writes behind
    for process in psutil.Process().children(recursive=True):
        process.send_signal(signal.Signals[end])
        process.wait()
    if end == "SIGKILL":
        os.kill(os.getpid(), signal.SIGKILL)
    logger.log_event(last_step, "stop", reason=end)
    logger.close(75)
    os._exit(75)


@pytest.mark.parametrize(("end", "code"), [("SIGKILL", -signal.SIGKILL), ("SIGTERM", 75)])
def test_wandb_sync_sends_every_row_of_an_ended_and_continued_run_once(tmp_path, end, code):
    program = f"from tests.training.test_wandb_sync import ended_launch; ended_launch({str(tmp_path)!r}, 3, {end!r})"
    home = {"HOME": str(tmp_path / "home"), "WANDB_MODE": None}
    done = run_python(["-c", program], env=home)
    assert done.returncode == code, done.stderr
    launch(tmp_path, {}, 3, 6)
    files, rows = synced(tmp_path)
    assert len(files) == 2
    assert rows == by_step(read_records(tmp_path / METRICS_FILE))
    assert ("events/stop" in rows[3]) == (end == "SIGTERM")
    kinds = {record.WhichOneof("record_type") for record in records_of(next(files[1].glob("*.wandb")))}
    assert "preempting" not in kinds, "the second launch was not stopped"


def rewound_launch(folder: str, begin: int, spikes: list[tuple[int, int]], end: int) -> None:
    """Steps to `end`; at each spike, a step and where the run goes back to, as `Outputs.decided` logs it."""
    logger = MetricsLogger(
        Path(folder), MetricsConfig(), is_first_rank=True, total_steps=9, resumed_step=begin, run_id="kept1234", facts=FACTS,
    )  # fmt: skip
    step = begin
    with logger:
        for spike, back in [*spikes, (end + 1, end)]:
            while step + 1 < spike:
                step += 1
                log(logger, step, loss=step + 0.25 * spike)
            if spike <= end:
                step = back
                logger.go_back(back)
                logger.log_event(
                    back, "spike", spike_step=spike, action="leave_out", documents=["7 of books"], left_out=1
                )


def test_steps_that_are_done_again_after_a_spike_have_rows_of_their_own(tmp_path):
    """A rewind, one within what was done again, and after a restart one more: no row is lost, none sent twice."""
    home = {"HOME": str(tmp_path / "home"), "WANDB_MODE": None}
    for begin, spikes, end in ((0, [(5, 2), (4, 2)], 6), (5, [(8, 5)], 8)):
        call = f"rewound_launch({str(tmp_path)!r}, {begin}, {spikes}, {end})"
        done = run_python(["-c", f"from tests.training.test_wandb_sync import rewound_launch; {call}"], env=home)
        assert done.returncode == 0, done.stderr
    files, rows = synced(tmp_path)
    assert len(files) == 2
    passes = [(row[STEP_KEY], row.get("train/loss"), row.get("events/spike")) for _, row in sorted(rows.items())]
    assert passes == [
        *[(1, 2.25, None), (2, 3.25, None), (3, 4.25, None), (4, 5.25, None), (5, None, 1)],
        *[(3, 4.0, None), (4, None, 1)],
        *[(3, 4.75, None), (4, 5.75, None), (5, 6.75, None), (6, 7.75, None)],
        *[(7, 9.0, None), (8, None, 1), (6, 8.25, None), (7, 9.25, None), (8, 10.25, None)],
    ]
    last = {row[STEP_KEY]: row["train/loss"] for _, row in sorted(rows.items()) if "train/loss" in row}
    assert last == {
        record["step"]: record["loss"] for record in read_records(tmp_path / METRICS_FILE) if "loss" in record
    }


def synced(run: Path) -> tuple[list[Path], dict[int, dict[str, float]]]:
    """The folders of W&B in a run that was recorded offline, and the rows that `wandb sync` sends of them, each once."""
    env = {"HOME": str(run / "home"), "WANDB_MODE": None, "WANDB_API_KEY": KEY}
    with wandb_server() as (address, rows):
        files = sorted((run / "wandb").glob("offline-*"))
        sync = run_cli(["wandb", "sync", *files], env=env | {"WANDB_BASE_URL": address})
        assert sync.returncode == 0, sync.stderr
    return files, sent_once(rows)


def sent_once(rows: list[dict[str, Any]]) -> dict[int, dict[str, float]]:
    """By step; W&B's own keys are left out."""
    assert len({row["_step"] for row in rows}) == len(rows), "a row was sent twice"
    return {row["_step"]: {key: value for key, value in row.items() if not key.startswith("_")} for row in rows}


class Recorder:
    """W&B's run as far as `WandbRun` uses it, with its rule: a row takes values until a later step has some."""

    resumed, starting_step, offline = False, 0, True
    settings = SimpleNamespace(sync_dir="wandb")

    def __init__(self):
        self.rows: dict[int, dict[str, float]] = {}

    def log(self, values: dict[str, float], step: int) -> None:
        assert step >= max(self.rows, default=0), "W&B drops what comes for an earlier step"
        self.rows.setdefault(step, {}).update(values)

    def define_metric(self, name: str, step_metric: str) -> None:
        """Nothing to do."""

    def finish(self, exit_code: int) -> None:
        """Nothing to do."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A whole run of six steps."""
    folder = tmp_path_factory.mktemp("finished")
    launch(folder, {}, 0, 6)
    return folder


@examples(150)
@given(data=st.data())
def test_wherever_a_kill_cuts_the_file_nothing_is_lost_or_sent_twice(finished, tmp_path, monkeypatch, data):
    """The file cut at any byte, or with rubbish behind the cut, as a file system leaves it that had no time."""
    (whole,) = (finished / "wandb").glob("offline-*/*.wandb")
    content, folder = whole.read_bytes(), tmp_path / "wandb" / whole.parent.name
    folder.mkdir(parents=True, exist_ok=True)
    cut = data.draw(st.integers(0, len(content)))
    rubbish = data.draw(st.sampled_from([b"", bytes(40), b"\xff" * 9]))
    (folder / whole.name).write_bytes(content[:cut] + rubbish)
    sent = Recorder()
    monkeypatch.setattr(wandb_run, "_open_run", lambda *_: (sent, None))
    records = read_records(finished / METRICS_FILE)
    of_another_launch = {"step": 6, "event": "notice"}  # one that ended before it had a row of its own
    run = WandbRun(tmp_path, MetricsConfig(), "kept1234", FACTS, None, [*records, of_another_launch])
    run.write({"step": 6, "event": "resume"})
    run.close(0)
    kept = {}
    if (folder / whole.name).exists():
        found = (folder / whole.name).read_bytes()
        assert content.startswith(found)
        assert found[7:] == b"" or [*messages(found)][-1][1] == len(found), "wandb sync stops at a torn end"
        kept = read_run(folder / whole.name)[2]
    assert not kept.keys() & sent.rows.keys(), "a row would be sent twice"
    expected = by_step(records)
    late = {"events/notice": 1, "events/resume": 1}
    if 6 in sent.rows:
        expected[6] |= late
    else:  # the row of step 6 is closed: a later one takes what came after it
        expected[7] = late | {STEP_KEY: 6}
    assert kept | sent.rows == expected


TROUBLES = {
    "a home that cannot be written": ({"HOME": "/proc/nowhere", "WANDB_MODE": None}, 0),
    "a server that does not answer": ({"WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": KEY}, 1),
    "a service that was killed": ({"KILL_AFTER": "3"}, 1),
}  # fmt: skip


def troubled_launch(folder: str, mode: str | None) -> None:
    """Six steps, after three of which W&B's service is killed if the environment says so."""
    logger = MetricsLogger(
        Path(folder), MetricsConfig(), is_first_rank=True, total_steps=6, run_id="kept1234", facts=FACTS, wandb_mode=mode,
    )  # fmt: skip
    with logger:
        for step in range(1, 7):
            log(logger, step)
            if os.environ.get("KILL_AFTER") == str(step):
                for process in psutil.Process().children(recursive=True):
                    process.kill()
                    process.wait()
    print("trained to the end")


@pytest.mark.parametrize("trouble", TROUBLES)
def test_trouble_with_wandb_is_said_once_and_stops_nothing(tmp_path, trouble):
    env, sentences = TROUBLES[trouble]
    mode = env.get("WANDB_MODE")
    program = (
        f"from tests.training.test_wandb_sync import troubled_launch; troubled_launch({str(tmp_path)!r}, {mode!r})"
    )
    done = run_python(["-c", program], env={"HOME": str(tmp_path / "home"), **env})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "trained to the end"
    assert [line for line in done.stdout.splitlines() if not line.startswith("step ")] == ["trained to the end"]
    assert len(done.stderr.splitlines()) == sentences, done.stderr
    assert all(line.startswith("warning: W&B ") for line in done.stderr.splitlines())
    assert len(read_records(tmp_path / METRICS_FILE)) == 6


def online_launch(folder: str, resumed_step: int, last_step: int, finish_seconds: float) -> None:
    """A launch that logs as the training loop does, to the server in the environment; how long W&B took at both ends."""
    wandb_run.FINISH_SECONDS = finish_seconds
    began = time.monotonic()
    logger = MetricsLogger(
        Path(folder), MetricsConfig(), is_first_rank=True, total_steps=9, resumed_step=resumed_step, run_id="kept1234",
        facts=FACTS,
    )  # fmt: skip
    opened = time.monotonic()
    with logger:
        for step in range(resumed_step + 1, last_step + 1):
            log(logger, step)
        logger.log_event(last_step, "stop", reason="SIGTERM")
        closing = time.monotonic()
        logger.close(75)
    print(f"seconds {opened - began} {time.monotonic() - closing}")


def online(
    folder: Path, address: str, resumed_step: int, last_step: int, finish_seconds: float = 60.0
) -> tuple[float, float, str]:
    """Seconds at the beginning and at the end, and what was said on standard error."""
    call = f"online_launch({str(folder)!r}, {resumed_step}, {last_step}, {finish_seconds})"
    env = {"HOME": str(folder / "home"), "WANDB_MODE": None, "WANDB_BASE_URL": address, "WANDB_API_KEY": KEY}
    done = run_python(["-c", f"from tests.training.test_wandb_sync import online_launch; {call}"], env=env)
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.splitlines()[-1].split()[1:]
    return float(first), float(last), done.stderr


def test_a_server_that_is_slow_dead_or_deaf_costs_seconds_and_gets_all_rows_later(tmp_path):
    dead = f"http://127.0.0.1:{free_port()}"
    opened, _, said = online(tmp_path, dead, 0, 2)
    assert opened < 45  # with the import of wandb and the start of its service; W&B itself tries for 90
    assert said == (
        f"warning: W&B is not available (no server at {dead}: Connection refused); recording offline under {tmp_path}/wandb\n"
    )
    rows: list[dict[str, Any]] = []
    with wandb_server(rows, "slow") as (address, _):
        assert online(tmp_path, address, 2, 4)[2] == ""
    with wandb_server(rows, "takes nothing") as (address, _):
        _, closed, said = online(tmp_path, address, 4, 6, 2.0)
        assert closed < 45  # W&B itself would wait for ever
        assert said.startswith("warning: W&B's server has not taken everything within 2 s")
        assert len(said.splitlines()) == 1
    with wandb_server(rows) as (address, _):
        assert online(tmp_path, address, 6, 8)[2] == ""
    assert sent_once(rows) == by_step(read_records(tmp_path / METRICS_FILE))
