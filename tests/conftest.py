"""Properties are checked for what they say, not for how long a busy machine takes; a run of tests starts its ranks once."""

import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests import processes
from tests.properties import MOST_WHEN_FAST
from tests.ranks import RankPool

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before anything imports DeepSpeed, which would look for a GPU
quiet = [HealthCheck.function_scoped_fixture]  # the same folder for all examples
settings.register_profile("longform", deadline=None, derandomize=True, suppress_health_check=quiet)
settings.register_profile("fast", parent=settings.get_profile("longform"), max_examples=MOST_WHEN_FAST)
settings.load_profile("longform")
LONGEST = (
    *("engine/test_layouts.py", "engine/test_spikes.py", "test_readme.py", "cluster/test_hosts.py"),
    *("engine/test_adapters.py", "engine/test_resume.py", "engine/test_mixtures.py", "test_train.py"),
    *("cluster/test_supervised.py", "cluster/test_requests.py", "launch/test_supervisor.py", "tools/test_tasks.py"),
    *("test_stopping.py", "tools/test_export.py", "tools/test_demo.py", "bench/test_equivalence.py"),
    *("data_prep/test_encode.py", "data_prep/test_repack.py", "data_prep/test_build.py", "data_prep/test_find.py"),
    *("tools/test_resume_check.py", "test_smollm2_training.py", "engine/test_nonfinite.py", "engine/test_stages.py"),
    *("engine/test_compile.py", "engine/run/test_watchdog.py", "engine/run/test_memory.py", "test_disk.py"),
)
"""Files of tests that take minutes: begun first, so that no worker is left with one of them in the end."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="skip what starts processes and is not marked `fast`")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("fast"):
        settings.load_profile("fast")
        sys.addaudithook(processes.skip_before_python)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    folder = Path(__file__).parent
    place = {folder / name: number for number, name in enumerate(LONGEST)}
    assert all(file.is_file() for file in place), "tests.conftest.LONGEST names a file that is none"
    items.sort(key=lambda item: place.get(item.path, len(place)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Whatever a test needs to run is asked for after this, and may skip it."""
    processes.left_out = item.config.getoption("fast") and not item.get_closest_marker("fast")


@pytest.fixture(autouse=True)
def _no_lines_of_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command says on stderr does not depend on how busy the machine is."""
    monkeypatch.setattr("console.progress.LINE_SECONDS", math.inf)


@pytest.fixture(scope="session")
def on_ranks() -> Iterator[Callable[..., list[Any]]]:
    """`on_ranks(2, function, *arguments)` is `run_ranks` on processes that wait for it: new ones after a failed call."""
    with RankPool() as pool:
        yield pool.call
        pool.dismiss()
