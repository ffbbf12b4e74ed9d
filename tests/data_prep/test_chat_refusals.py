"""Conversations that cannot be used, and what `data_prep.inspect` and `data_prep.verify` make of those that are."""

import json
import re
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.chat import ChatFormat
from data_prep.verify import problems
from storage.manifest import read_manifest
from storage.shards import open_split
from tests.data_prep.builds import build_here, failure, read, run
from tests.data_prep.chats import CHATML, CHATS, turns, unmarked

# --- what is refused --------------------------------------------------------------------------------------------------


def test_what_is_no_conversation_is_named_with_its_place(chat_folder, tmp_path):
    bad = {
        3: ({"messages": [{"role": "human", "content": "a"}]}, "unknown role (message 1: 'human', known are "),
        5: ({"messages": turns(["a"])}, "no message of the assistant"),
        6: ({"messages": "a"}, "field 'messages' is not a list of messages (text)"),
        8: ({"text": "a"}, "no field 'messages' (it has text)"),
        9: ({"messages": turns(["\ud800", "b"])}, "invalid UTF-8"),
        11: ({"messages": turns(["raise", "b"])}, "the chat template fails (cannot)"),
    }
    template = "{%- if messages[0].content == 'raise' %}{{- raise_exception('cannot') }}{%- endif %}" + unmarked(CHATML)
    records = [{"messages": record["messages"]} for record in CHATS]
    for line in sorted(bad):
        records.insert(line - 1, bad[line][0])
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "template.jinja").write_text(template)
    words = ["--input", file, "--tokenizer", chat_folder, "--output", tmp_path / "data", "--seq-length", 512]
    words += ["--messages-field", "messages", "--workers", 1, "--chat-template", tmp_path / "template.jinja"]
    assert f"in.jsonl line 3: {bad[3][1]}" in failure(run("build", *words))
    done = run("build", *words, "--on-error", "skip")
    assert done.returncode == 0, done.stderr
    left_out = read_manifest(tmp_path / "data").statistics["input"]
    assert sum(left_out["skipped"].values()) == len(bad)
    for line, example in zip(sorted(bad), left_out["skipped_examples"], strict=False):
        assert f"in.jsonl line {line}: {bad[line][1]}" in example
        assert example in done.stdout
    assert (tmp_path / "data" / "tokenizer" / "chat_template.jinja").read_text() == template


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt_field": "q"}, "--prompt-field and --response-field go together"),
        ({"prompt_field": "q", "response_field": "q"}, "--prompt-field and --response-field both name 'q'"),
        ({"messages_field": "m", "prompt_field": "q", "response_field": "a"}, "not both"),
        ({"messages_field": "m", "text_field": "body"}, "--text-field body is not read"),
        ({"chat_template": "x"}, "--chat-template needs --messages-field"),
        (
            {"messages_field": "messages", "chat_template": "{% if %}"},
            "the chat template fails (Expected an expression",
        ),
        (
            {"messages_field": "messages", "chat_template": "{{ messages | length }}{{ messages[0].content }}"},
            "the chat template changes what stands before an answer (message 2: put {% generation %} and ",
        ),
        (
            {"messages_field": "messages", "encoder": "accelerated"},
            "--encoder accelerated: conversations are encoded by",
        ),
    ],
)
def test_options_that_cannot_be_followed(chats, chat_folder, tmp_path, options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        build_here([chats], chat_folder, tmp_path / "data", **options)


def test_files_that_hold_no_conversations(tmp_path):
    chat = ChatFormat(CHATML, {}, (), "messages")
    (tmp_path / "a.txt").write_text("text")
    pq.write_table(pa.table({"messages": ["a"]}), tmp_path / "b.parquet")
    (tmp_path / "c.csv").write_text("id,text\n1,a\n")
    for name, words in (
        ("a.txt", "a.txt: a text file holds no conversations"),
        ("b.parquet", "column 'messages' holds string, not lists of messages (see --messages-field)"),
        ("c.csv", "no column 'messages': it has id, text (see --messages-field)"),
    ):
        _, found = read(tmp_path / name, on_error="skip", chat=chat)
        assert words in found.examples[0]


def test_a_damaged_table_of_conversations_gives_what_stands_before_and_counts_the_rest(tmp_path):
    table, path = pa.table({"messages": [record["messages"] for record in CHATS]}), tmp_path / "chats.parquet"
    pq.write_table(table, path, row_group_size=20, use_dictionary=False, write_page_checksum=True)
    group = pq.ParquetFile(path).metadata.row_group(1)
    data = bytearray(path.read_bytes())
    data[group.column(1).data_page_offset + group.column(1).total_compressed_size - 9] ^= 1
    path.write_bytes(data)
    found, left = read(path, on_error="skip", chat=ChatFormat(unmarked(CHATML), {}, (), "messages"))
    assert len(found) == 40
    assert [entry.size for entry in left.left_out] == [sum(group.column(i).total_compressed_size for i in (0, 1))]


# --- looking and checking ---------------------------------------------------------------------------------------------


def test_inspect_shows_what_carries_loss(chat_data):
    done = run("inspect", chat_data)
    assert "targets      " in done.stdout
    document = run("inspect", chat_data, "--document", "chat-2")
    for message in CHATS[2]["messages"]:
        opening = "⟪" if message["role"] == "assistant" else ""
        assert f"<|im_start|>{message['role']}\n{opening}{message['content']}<|im_end|>\n" in document.stdout
    assert document.stdout.endswith("</s>⟫\n")
    dataset = open_split(chat_data, "train")
    number = next(n for n in range(len(dataset)) if len(dataset.spans("documents", n)) > 1)
    row = run("inspect", chat_data, "--row", number)
    assert row.stdout.count("⟪") == row.stdout.count("⟫") == len(dataset.spans("documents", number))


@pytest.mark.parametrize("change", ["shifted", "emptied"])
def test_verify_checks_the_targets(chat_data, tmp_path, change):
    data = tmp_path / "data"
    shutil.copytree(chat_data, data)
    file = data / "train" / "shard-documents-00000.arrow"
    with pa.memory_map(str(file)) as mapped, pa.ipc.open_stream(mapped) as stream:
        schema, batches = stream.schema, list(stream)
    with pa.OSFile(str(tmp_path / "new"), "wb") as out, pa.ipc.new_stream(out, schema) as stream:
        for batch in batches:
            column = batch["target_spans"]
            values = column.values.values.to_numpy().copy()
            values[:2] = (values[:2] - values[0]) if change == "shifted" else values[0]
            pairs = pa.FixedSizeListArray.from_arrays(pa.array(values), 2)
            stream.write_batch(
                pa.record_batch(
                    [*batch.columns[:-1], pa.ListArray.from_arrays(pa.array(column.offsets), pairs)], schema=schema
                )
            )
    shutil.copy(tmp_path / "new", file)
    found = [problem for _, problem in problems(data) if problem]
    assert f"targets are {'outside of what can carry loss' if change == 'shifted' else 'empty'}" in found[0]
