import pytest

from data_prep.tokenizer import SentencePieceTokenizer
from data_prep.tokenizer_files import MODEL_FILE
from data_prep.tokenizer_training import train
from tests.data_prep.builds import UNIT_BYTES, build_here
from tests.data_prep.texts import PROSE, write_prose


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A small tokenizer trained on Python's documentation topics."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / MODEL_FILE).write_bytes(train(PROSE, 1200))
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder):
    return SentencePieceTokenizer(tokenizer_folder / MODEL_FILE)


@pytest.fixture(scope="session")
def prose(tmp_path_factory):
    return write_prose(tmp_path_factory.mktemp("input") / "prose.jsonl", copies=3)


@pytest.fixture(scope="session")
def reference(prose, tokenizer_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("reference") / "data"
    build_here([prose], tokenizer_folder, output, unit_bytes=UNIT_BYTES)
    return output
