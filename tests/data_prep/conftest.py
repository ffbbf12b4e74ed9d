import shutil

import pytest

from data_prep.tokenizer import SentencePieceTokenizer
from data_prep.tokenizer_files import MODEL_FILE
from data_prep.tokenizer_training import train
from tests.data_prep.builds import UNIT_BYTES, build_here
from tests.data_prep.chats import CHAT_OPTIONS, CHATML, CHATS, unmarked
from tests.data_prep.texts import PROSE, write_lines, write_prose


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


@pytest.fixture(scope="session")
def chat_folder(tokenizer_folder, tmp_path_factory):
    """A tokenizer with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "tokenizer"
    shutil.copytree(tokenizer_folder, folder)
    (folder / "chat_template.jinja").write_text(unmarked(CHATML))
    return folder


@pytest.fixture(scope="session")
def chats(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("input") / "chats.jsonl", CHATS)


@pytest.fixture(scope="session")
def chat_data(chats, chat_folder, tmp_path_factory):
    """Rows of 128 tokens, shorter than most of the conversations."""
    output = tmp_path_factory.mktemp("built") / "data"
    build_here([chats], chat_folder, output, overlap=5, cut="structure", **CHAT_OPTIONS)
    return output
