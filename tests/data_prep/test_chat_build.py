"""Data sets of conversations: what is stored, packed, shown and refused."""

import json
import math
import re
import shutil

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.chat import ChatFormat, special_names
from data_prep.chat_tokens import ChatEncoder
from data_prep.repack import repack
from data_prep.store import TokenStore
from data_prep.tokenizer import open_tokenizer
from data_prep.verify import problems
from storage.manifest import PackingPolicy, read_manifest
from storage.shards import open_split
from tests.data_prep.builds import build_here, contents, failure, read, run
from tests.data_prep.chats import CHATML, INST, marked, prose_chats, turns, unmarked
from tests.data_prep.texts import PROSE, write_lines
from training.data import NO_TARGET, make_batch
from training.scores import scores

CHATS, UNIT_BYTES = prose_chats(60), 1 << 13
OPTIONS = {"messages_field": "messages", "id_field": "id", "unit_bytes": UNIT_BYTES, "validation_fraction": 0.1}


@pytest.fixture(scope="module")
def chat_folder(tokenizer_folder, tmp_path_factory):
    """A tokenizer with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "tokenizer"
    shutil.copytree(tokenizer_folder, folder)
    (folder / "chat_template.jinja").write_text(unmarked(CHATML))
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("input") / "chats.jsonl", CHATS)


@pytest.fixture(scope="module")
def chat_data(chats, chat_folder, tmp_path_factory):
    """Rows of 128 tokens, shorter than most of the conversations."""
    output = tmp_path_factory.mktemp("built") / "data"
    build_here([chats], chat_folder, output, overlap=5, cut="structure", **OPTIONS)
    return output


def masks_of(data) -> list[np.ndarray]:
    """Which tokens of each stored document carry loss."""
    store = TokenStore.open(data / "tokens")
    spans, _ = store.targets(np.arange(len(store)))
    masks = [np.zeros(len(store.tokens(doc)), bool) for doc in range(len(store))]
    for doc, mask in enumerate(masks):
        for i in range(*spans.splits[doc : doc + 2]):
            mask[spans.begin[i] : spans.end[i]] = True
    return masks


def test_the_store_holds_each_conversation_with_its_targets(chat_data, chat_folder):
    store, masks = TokenStore.open(chat_data / "tokens"), masks_of(chat_data)
    tokenizer = open_tokenizer(chat_folder)
    chat = ChatFormat(unmarked(CHATML), special_names(tokenizer), tokenizer.control_strings, "messages")
    found = ChatEncoder(tokenizer).encode([chat.render(record) for record in CHATS])
    assert [store.key(doc) for doc in range(len(store))] == [record["id"] for record in CHATS]
    assert np.array_equal(np.concatenate([store.tokens(doc) for doc in range(len(store))]), found.ids)
    assert sum(int(mask.sum()) for mask in masks) == found.targets.tokens
    for doc, record in enumerate(CHATS):
        said = [m["content"] + "<|im_end|>" for m in record["messages"] if m["role"] == "assistant"]
        text = tokenizer.decode(store.tokens(doc)[masks[doc]])
        assert " ".join(text.split()) == " ".join(" ".join(said).split())


@pytest.mark.parametrize(
    "policy", [None, {"policy": "concat"}, {"seq_length": 33, "overlap": 4}, {"seq_length": 4096, "tail": "pad"}]
)
def test_rows_carry_the_same_targets_each_once(chat_data, tmp_path, policy):
    data = chat_data if policy is None else tmp_path / "again"
    if policy is not None:
        repack(chat_data, PackingPolicy(**{"seq_length": 128} | policy), data)
    masks, manifest, seen = masks_of(chat_data), read_manifest(data), 0
    for split, sources in manifest.splits.items():
        dataset = open_split(data, split)
        counted = 0
        for number in range(len(dataset)):
            batch, row, at = make_batch(dataset, np.array([0]), np.array([number])), dataset.row("documents", number), 0
            expected = np.full(manifest.seq_length + 1, NO_TARGET)
            for length, context, doc, off in zip(*(column.tolist() for column in row[1:]), strict=True):
                carries = masks[doc][off : off + length] & (np.arange(length) >= max(context, 1))
                expected[at : at + length][carries] = row.ids[at : at + length][carries]
                at += length
            assert batch["targets"][0].tolist() == expected[1:].tolist()
            counted += batch["num_targets"]
        assert counted == sources["documents"].targets > 0
        seen += counted
    assert seen == sum(int(mask[1:].sum()) for mask in masks)
    tokens = sum(map(len, masks))
    share = {"tokens": seen, "share": round(seen / tokens, 6)}
    assert manifest.statistics["targets"] == share | {"sources": {"documents": share}}
    assert [problem for _, problem in problems(data, full=True) if problem] == []


def test_bits_per_byte_are_of_the_text_that_carries_loss(chat_data):
    entry = read_manifest(chat_data).splits["train"]["documents"]
    dataset = open_split(chat_data, "train")
    said = [len(m["content"].encode()) for record in CHATS for m in record["messages"] if m["role"] == "assistant"]
    validation = read_manifest(chat_data).splits["validation"]["documents"]
    ends = len("<|im_end|>\n") * len(said)
    assert entry.target_bytes + validation.target_bytes == sum(said) + ends
    found = scores(dataset, loss_sum=2.0 * entry.targets, targets=entry.targets)
    assert found["bits_per_byte"] == pytest.approx(2 / math.log(2) * entry.targets / entry.target_bytes)


def test_datasets_opens_the_rows_with_their_targets(chat_data):
    opened, dataset = datasets.load_from_disk(str(chat_data))["train"], open_split(chat_data, "train")
    assert len(opened) == len(dataset)
    for number in (0, len(dataset) - 1):
        assert opened[number]["target_spans"] == dataset.spans("documents", number).tolist()


# --- the same bytes ---------------------------------------------------------------------------------------------------


def test_workers_hash_seed_and_the_place_of_the_template_do_not_show(
    chats, tokenizer_folder, chat_folder, chat_data, tmp_path
):
    words = ["--input", chats, "--tokenizer", tokenizer_folder, "--output", tmp_path / "data", "--seq-length", 128]
    words += ["--messages-field", "messages", "--id-field", "id", "--unit-bytes", UNIT_BYTES, "--overlap", 5]
    words += ["--cut", "structure", "--validation-fraction", 0.1, "--workers", 2]
    refused = run("build", *words)
    assert "has no chat template (chat_template.jinja, or `chat_template` in tokenizer_config.json)" in failure(refused)
    done = run("build", *words, "--chat-template", chat_folder / "chat_template.jinja", PYTHONHASHSEED="3")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "data") == contents(chat_data)
    targets = read_manifest(chat_data).statistics["targets"]
    share = f"{targets['tokens']:,} ({100 * targets['share']:.1f} % of all tokens), what the assistant writes"
    assert re.search(rf"^  targets +{re.escape(share)}$", done.stdout, re.MULTILINE)


def test_an_interrupted_build_continues(chats, chat_folder, chat_data, tmp_path):
    output = tmp_path / "data"
    shutil.copytree(chat_data, output)
    for name in ("manifest.json", "tokens/unit-00001.json", "tokens/unit-00003.arrow"):
        (output / name).unlink()
    build_here([chats], chat_folder, output, overlap=5, cut="structure", **OPTIONS)
    assert contents(output) == contents(chat_data)


def test_packed_again_it_is_what_a_build_would_be(chats, chat_folder, chat_data, tmp_path):
    repack(chat_data, PackingPolicy(seq_length=300), tmp_path / "again")
    build_here([chats], chat_folder, tmp_path / "built", seq_length=300, **OPTIONS)
    assert contents(tmp_path / "again") == contents(tmp_path / "built")


def test_another_template_is_another_data_set(chats, chat_folder, chat_data, tmp_path):
    words = re.escape("was begun with another plan (chat_template is ")
    with pytest.raises(ValueError, match=words):
        build_here([chats], chat_folder, chat_data, overlap=5, cut="structure", chat_template=marked(INST), **OPTIONS)


def test_data_sets_of_texts_say_nothing_of_targets(reference):
    manifest, plan = (json.loads((reference / name).read_text()) for name in ("manifest.json", "plan.json"))
    assert "target_spans" not in manifest
    assert "targets" not in manifest["statistics"]
    assert "target_bytes" not in manifest["splits"]["train"]["documents"]
    assert not {"messages_field", "prompt_field", "response_field", "chat_template"} & plan["plan"].keys()
    assert "targets" not in json.loads((reference / "tokens" / "unit-00000.json").read_text())
    for file in ("tokens/unit-00000.arrow", "train/shard-documents-00000.arrow"):
        with pa.memory_map(str(reference / file)) as mapped, pa.ipc.open_stream(mapped) as stream:
            assert not {"targets", "target_bytes", "target_spans"} & {*stream.schema.names}
    assert open_split(reference, "train").spans("documents", 0) is None


# --- the forms of input -----------------------------------------------------------------------------------------------


def test_tables_lists_and_lines_hold_the_same_conversations(chats, chat_folder, tmp_path):
    table = pa.table({name: [record[name] for record in CHATS] for name in ("id", "messages")})
    pq.write_table(table, tmp_path / "chats.parquet", row_group_size=7)
    with pa.OSFile(str(tmp_path / "chats.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, 9)
    (tmp_path / "chats.json").write_text(json.dumps(CHATS))
    files = [chats, *(tmp_path / f"chats.{suffix}" for suffix in ("parquet", "arrow", "json"))]
    stores = [
        build_here([file], chat_folder, tmp_path / f"data{number}", **OPTIONS | {"unit_bytes": None})
        for number, file in enumerate(files)
    ]
    assert len({manifest.splits["train"]["documents"].shards[0].rows for manifest in stores}) == 1
    rows = [[row.ids.tolist() for row in rows_of(tmp_path / f"data{number}")] for number in range(len(files))]
    assert rows[0] == rows[1] == rows[2] == rows[3]


def rows_of(data):
    dataset = open_split(data, "train")
    return [dataset.row("documents", number) for number in range(len(dataset))]


def test_prompts_and_responses_are_conversations_of_one_turn(chat_folder, tmp_path):
    pairs = [{"q": PROSE[i][:90], "a": PROSE[i + 1][:200]} for i in range(20)]
    as_chats = [{"messages": turns([pair["q"], pair["a"]])} for pair in pairs]
    built = []
    for name, records, fields in (
        ("pairs", pairs, {"prompt_field": "q", "response_field": "a"}),
        ("chats", as_chats, {"messages_field": "messages"}),
    ):
        folder = tmp_path / name
        folder.mkdir()
        write_lines(folder / "in.jsonl", records)
        build_here([folder / "in.jsonl"], chat_folder, folder / "data", validation_fraction=0, **fields)
        built.append([row.ids.tolist() for row in rows_of(folder / "data")])
    assert built[0] == built[1]


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
        ({"messages_field": "m", "prompt_field": "q", "response_field": "a"}, "not both"),
        ({"messages_field": "m", "text_field": "body"}, "--text-field body is not read"),
        ({"chat_template": "x"}, "--chat-template needs --messages-field"),
        (
            {"messages_field": "messages", "chat_template": "{% if %}"},
            "the chat template fails: Expected an expression",
        ),
        (
            {"messages_field": "messages", "chat_template": "{{ messages | length }}{{ messages[0].content }}"},
            "the chat template changes what stands before an answer: message 2: put {% generation %} and ",
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
