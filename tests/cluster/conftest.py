"""The same hosts for all tests here; skipped with the reason where a machine cannot have them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.cluster.network import Cluster, missing_device
from tests.engine.programs import RECIPE, prepare
from tests.processes import CODE, ROOT

CHANGES = {
    # no end and no decay: a run that is stopped at any step had the same losses before as one that went on
    "training": RECIPE["training"] | {"max_steps": 100_000},
    "schedule": {"schedule": "constant", "warmup_steps": 2},
    "validation": {"every_steps": None},
    "checkpoint": {"every_steps": 50},
}


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if reason := missing_device():
        pytest.skip(reason)
    with Cluster() as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def restored(request) -> Iterator[None]:
    """After each test every host is there again."""
    yield
    if "cluster" in request.fixturenames:
        request.getfixturevalue("cluster").restore_all()


@pytest.fixture(scope="session")
def shared(cluster) -> Path:
    """A folder that all hosts see, with the repository, `data`, `recipe.yaml` and a hostfile of two."""
    folder = cluster.folder / "shared"
    folder.mkdir()
    prepare(folder)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | CHANGES))
    for name in CODE:
        (folder / name).symlink_to(ROOT / name)
    (folder / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    return folder
