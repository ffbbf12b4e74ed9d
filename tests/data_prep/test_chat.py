"""Conversations become the ids and the targets that `transformers` gives, whichever tokenizer the data set has."""

import json
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from data_prep.chat import ChatFormat, own_template, special_names
from data_prep.chat_tokens import ChatEncoder
from data_prep.records import BadRecord
from data_prep.tokenizer import Tokenizer, open_tokenizer
from tests.data_prep.chats import CHATML, INST, PLAIN, TEMPLATES, conversations, marked, texts, turns, unmarked
from tests.data_prep.texts import DEEPSEEK, MISTRAL
from tests.properties import examples
from tools.hf_tokenizer import write_hf_tokenizer

KINDS = ("trained", "sentencepiece", "byte-level")
Encoded = tuple[list[int], list[bool]]


class Opened(NamedTuple):
    ours: Tokenizer
    encoder: ChatEncoder
    names: dict[str, str]
    control: dict[str, int]
    theirs: object
    """The tokenizer as `transformers` loads it from an export."""

    def chat_format(self, template: str, **fields: str) -> ChatFormat:
        columns = {"messages": None} | (fields or {"messages": "messages"})
        return ChatFormat(template, self.names, self.ours.control_strings, **columns)

    def encode(self, template: str, messages: list[dict]) -> Encoded:
        found = self.encoder.encode([self.chat_format(template).render({"messages": messages})])
        mask = np.zeros(len(found.ids), bool)
        for begin, end in zip(found.targets.begin, found.targets.end, strict=True):
            mask[begin:end] = True
        return found.ids.tolist(), mask.tolist()

    def encode_theirs(self, template: str, messages: list[dict]) -> Encoded:
        """What `apply_chat_template` says, with the end of the document that is ours."""
        options = {"return_dict": True, "return_assistant_tokens_mask": True}
        found = self.theirs.apply_chat_template(messages, chat_template=template, **options)
        ids, mask = found["input_ids"], [bool(inside) for inside in found["assistant_masks"]]
        last = len(ids)
        while not self.theirs.decode(ids[last - 1 : last]).strip():
            last -= 1
        if ids[last - 1] != self.ours.eos_id:
            ids, mask = [*ids, self.ours.eos_id], [*mask, mask[last - 1]]
        return ids, mask


@pytest.fixture(scope="module")
def opened(tokenizer_folder, tmp_path_factory) -> dict[str, Opened]:
    given = {"trained": tokenizer_folder, "sentencepiece": MISTRAL, "byte-level": DEEPSEEK}
    found = {}
    for kind, path in given.items():
        tokenizer, folder = open_tokenizer(path), tmp_path_factory.mktemp(kind)
        write_hf_tokenizer(tokenizer.info(tokenizer.path.name), tokenizer.path, folder, 10**6)
        loaded = AutoTokenizer.from_pretrained(folder)
        vocabulary = tokenizer.vocabulary()
        control = {token: vocabulary[token] for token in tokenizer.control_strings}
        found[kind] = Opened(tokenizer, ChatEncoder(tokenizer), special_names(tokenizer), control, loaded)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
@given(conversations)
@examples(40)
def test_ids_and_targets_are_those_of_transformers(opened, kind, name, messages):
    one = opened[kind]
    expected = one.encode_theirs(marked(TEMPLATES[name]), messages)
    assert one.encode(marked(TEMPLATES[name]), messages) == expected
    assert one.encode(unmarked(TEMPLATES[name]), messages) == expected


@pytest.mark.parametrize("kind", KINDS)
@given(st.lists(texts, min_size=2, max_size=2), st.data())
@examples(30)
def test_a_control_token_spelled_in_a_message_is_text(opened, kind, said, data):
    one = opened[kind]
    spelled = st.sampled_from([*one.control])
    with_token = [text[:3] + data.draw(spelled) + text[3:] for text in said]
    control = set(one.control.values())
    for template in (marked(INST), unmarked(INST)):
        ids, mask = one.encode(template, turns(with_token))
        plain, _ = one.encode(template, turns(said))
        assert [i for i in ids if i in control] == [i for i in plain if i in control]
        assert one.ours.decode(ids) == one.chat_format(template).render({"messages": turns(with_token)}).text.replace(
            one.names["bos_token"], "", 1
        ).removesuffix(one.names["eos_token"])
        answer = one.ours.decode(np.array(ids)[mask])
        assert answer.strip() == with_token[1].strip()


def test_private_characters_of_a_message_stay(opened):
    one, odd = opened["trained"], "\U0010ff00</s>\U0010ff01 and \U0010ff02"
    rendered = one.chat_format(marked(INST)).render({"messages": turns([odd, odd])})
    assert rendered.text == f"<s>[INST] {odd} [/INST] {odd}</s>"
    assert [rendered.text[slice(*stretch)] for stretch in rendered.literal] == ["</s>", "</s>"]
    assert [rendered.text[slice(*stretch)] for stretch in rendered.targets] == [f" {odd}</s>"]


def test_a_prompt_and_a_response_are_a_conversation(opened):
    one = opened["trained"]
    chat = one.chat_format(unmarked(CHATML), prompt="question", response="answer")
    both = one.chat_format(unmarked(CHATML)).render({"messages": turns(["Why?", "So."])})
    assert chat.render({"question": "Why?", "answer": "So.", "more": 1}) == both
    assert chat.columns == {"question": "--prompt-field", "answer": "--response-field"}
    for record, words in (
        ({"question": 1}, "field 'question' is not text"),
        ({"answer": " "}, "the assistant says nothing"),
    ):
        with pytest.raises(BadRecord, match=words):
            chat.render({"question": "Why?", "answer": "So."} | record)


def test_an_end_that_the_template_lacks_is_put_behind_the_answer(opened):
    one, end = opened["trained"], opened["trained"].ours.eos_id
    for template in (marked(PLAIN), unmarked(PLAIN), marked(INST), unmarked(INST)):
        ids, mask = one.encode(template, turns(["Why?", "So."]))
        assert (ids[-1], mask[-1], ids.count(end)) == (end, True, 1)
    ids, mask = one.encode(unmarked(PLAIN), [*turns(["Why?", "So."]), {"role": "user", "content": "And?"}])
    assert (ids[-1], mask[-1]) == (end, False)


def test_a_template_sees_no_clock(opened):
    dated = "{%- if strftime_now is defined %}{{- strftime_now('%Y') }}{%- else %}{{- 'no date ' }}{%- endif %}"
    text = opened["trained"].chat_format(dated + unmarked(CHATML)).render({"messages": turns(["a", "b"])}).text
    assert text.startswith("no date <|im_start|>user")


ANSWER = {"role": "assistant", "content": "b"}
LATER = unmarked(CHATML).replace("'<|im_end|>'", "('<|im_end|>' if loop.last else '')")


@pytest.mark.parametrize(
    ("messages", "template", "words"),
    [
        ("hello", CHATML, "field 'messages' is not a list of messages: text"),
        (None, CHATML, "field 'messages' is not a list of messages: null"),
        ({"role": "user"}, CHATML, "field 'messages' is not a list of messages: an object"),
        ([], CHATML, "no message of the assistant: "),
        (["a", ANSWER], CHATML, "a message is not an object with role and content: message 1: text"),
        ([{"from": "human", "value": "a"}], CHATML, "a message has no role: message 1 has from, value"),
        ([{"role": "human", "content": "a"}, ANSWER], CHATML, "unknown role: message 1: 'human', known are system, "),
        ([{"role": 3, "content": "a"}, ANSWER], CHATML, "unknown role: message 1: '3'"),
        (
            [{"role": "user", "content": ["a"]}, ANSWER],
            CHATML,
            "the content of a message is not text: message 1: a list",
        ),
        ([{"role": "user"}, ANSWER], CHATML, "the content of a message is not text: message 1: null"),
        ([{"role": "user", "content": "a"}], CHATML, "no message of the assistant: "),
        (turns(["a", " \n"]), CHATML, "the assistant says nothing: "),
        (turns(["a", "b"]), "{{ raise_exception('no\n  way') }}", "the chat template fails: no way"),
        (turns(["a", "b"]), "{{ messages[9].content }}", "the chat template fails: "),
        (turns(["a", "b"]), "{{ messages | tojson }", "the chat template fails: "),
        (
            turns(["a", "b"]),
            "{% generation %}{% endgeneration %}x",
            "the chat template writes nothing for the assistant: ",
        ),
        (
            turns(["a", "b", "c", "d"]),
            LATER,
            "the chat template changes what stands before an answer: message 2: put {% gen",
        ),
    ],
)
def test_what_cannot_be_used_is_said(opened, messages, template, words):
    with pytest.raises(BadRecord) as caught:
        opened["trained"].chat_format(unmarked(template)).render({"messages": messages})
    assert f"{caught.value.reason}: {caught.value.detail}".startswith(words)


def test_a_message_of_calls_needs_no_text(opened):
    calls = [{"function": {"name": "f", "arguments": {"x": "</s>"}}}]
    messages = [turns(["a"])[0], {"role": "assistant", "content": None, "tool_calls": calls}]
    template = "{% for m in messages %}{{ m.content or (m.tool_calls | tojson) }};{% endfor %}"
    text = opened["trained"].chat_format(template).render({"messages": messages}).text
    assert text == f"a;{json.dumps(calls)};"


def test_the_template_is_found_where_transformers_looks(tmp_path):
    assert own_template(tmp_path) is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "processor"}))
    assert own_template(tmp_path) == "processor"
    config, named = tmp_path / "tokenizer_config.json", [{"name": "default", "template": "named"}]
    for template, found in (("config", "config"), (named, "named"), ([named[0] | {"name": "rag"}], None)):
        config.write_text(json.dumps({"chat_template": template}))
        assert own_template(tmp_path) == found
    (tmp_path / "chat_template.jinja").write_text("file")
    assert own_template(tmp_path) == "file"
