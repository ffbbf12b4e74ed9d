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

from data_prep.build import build
from data_prep.chat import ChatFormat, special_names
from data_prep.chat_tokens import ChatEncoder
from data_prep.options import BuildOptions
from data_prep.plan import Plan
from data_prep.repack import repack
from data_prep.sources import parse_sources
from data_prep.store import TokenStore
from data_prep.summary import print_summary
from data_prep.tokenizer import open_tokenizer
from data_prep.verify import problems
from storage.manifest import PackingPolicy, read_manifest
from storage.shards import open_split
from tests.data_prep.builds import build_here, contents, failure, run
from tests.data_prep.chats import CHAT_OPTIONS, CHATML, CHATS, INST, marked, turns, unmarked
from tests.data_prep.texts import PROSE, write_lines
from training.data import NO_TARGET, make_batch
from training.scores import scores


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


def test_the_share_of_targets_is_said_by_source(chat_folder, tmp_path, capsys):
    sources = []
    for name, said in (("short", 40), ("long", 400)):
        write_lines(tmp_path / f"{name}.jsonl", [{"messages": turns([t[:100], t[:said]])} for t in PROSE[:12]])
        sources += [f"{name}={tmp_path / name}.jsonl"]
    tokenizer, policy = open_tokenizer(chat_folder), PackingPolicy(seq_length=64)
    options = BuildOptions(packing=policy, messages_field="messages", validation_fraction=0)
    manifest = build(Plan(parse_sources([], sources), options, tokenizer), tokenizer, tmp_path / "data")
    masks, store, found = masks_of(tmp_path / "data"), TokenStore.open(tmp_path / "data" / "tokens"), {}
    for name in ("short", "long"):
        mine = np.concatenate([masks[doc] for doc in store.documents("train", name).doc])
        found[name] = {"tokens": int(mine.sum()), "share": round(float(mine.mean()), 6)}
        assert manifest.splits["train"][name].targets == mine.sum()
    assert manifest.statistics["targets"]["sources"] == found
    print_summary(manifest, tmp_path, 1.0)
    shares = ", ".join(f"of {name} {100 * found[name]['share']:.1f} %" for name in ("short", "long"))
    assert f"what the assistant writes; {shares}\n" in capsys.readouterr().out


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
    words += [
        "--messages-field",
        "messages",
        "--id-field",
        "id",
        "--unit-bytes",
        CHAT_OPTIONS["unit_bytes"],
        "--overlap",
        5,
    ]
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
    build_here([chats], chat_folder, output, overlap=5, cut="structure", **CHAT_OPTIONS)
    assert contents(output) == contents(chat_data)


def test_packed_again_it_is_what_a_build_would_be(chats, chat_folder, chat_data, tmp_path):
    repack(chat_data, PackingPolicy(seq_length=300), tmp_path / "again")
    build_here([chats], chat_folder, tmp_path / "built", seq_length=300, **CHAT_OPTIONS)
    assert contents(tmp_path / "again") == contents(tmp_path / "built")


def test_another_template_is_another_data_set(chats, chat_folder, chat_data, tmp_path):
    words = re.escape(
        "was begun with another plan (chat_template is {%- for m in messages %} {{- '<|im_start there and "
    )
    with pytest.raises(ValueError, match=words):
        build_here(
            [chats], chat_folder, chat_data, overlap=5, cut="structure", chat_template=marked(INST), **CHAT_OPTIONS
        )


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
        build_here([file], chat_folder, tmp_path / f"data{number}", **CHAT_OPTIONS | {"unit_bytes": None})
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
