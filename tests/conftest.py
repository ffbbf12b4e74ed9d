"""Properties are checked for what they say, not for how long a busy machine takes; a run of tests starts its ranks once."""

import math
import os
import sys
from collections.abc import Callable, Iterator
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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="skip what starts processes and is not marked `fast`")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("fast"):
        settings.load_profile("fast")
        sys.addaudithook(processes.skip_before_python)


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
