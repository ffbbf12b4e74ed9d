"""Other hosts, by the ssh that launches use: without a password and without a question."""

import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
MOST_HOSTS_AT_ONCE = 64
ANSWER_SECONDS = 120.0  # torch may be imported from a cold shared file system


def run_on(
    host: str, command: str, source: str = "", seconds: float = ANSWER_SECONDS
) -> subprocess.CompletedProcess[str]:
    """Run a shell command there, `source` being its standard input; code -1 when it takes longer."""
    try:
        return subprocess.run(
            [*SSH, host, command],
            input=source,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(host, -1, "", f"no answer within {seconds:g} s")


def where_it_works(hosts: Iterable[str], command: str, seconds: float) -> set[str]:
    """The hosts on which a shell command ends with 0 in time, all asked at once."""
    with ThreadPoolExecutor(MOST_HOSTS_AT_ONCE) as pool:
        asked = [(host, pool.submit(run_on, host, command, seconds=seconds)) for host in hosts]
        return {host for host, answer in asked if answer.result().returncode == 0}
