"""`tools.generate` says the same from a run and from its export, and streams whole characters."""

from argparse import Namespace

import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from data_prep.tokenizer import open_tokenizer
from model.config import ModelConfig
from model.hf.weights import save_hf
from model.llama import Llama
from tests.data_prep.texts import DEEPSEEK, PROSE, awkward
from tests.forks import run_python
from tests.tools.called import call
from tests.tools.trained import MASKED, export_to
from tools import generate
from tools.hf_tokenizer import write_hf_tokenizer
from tools.trained import open_trained

PROMPT = "Enter HAMLET — ☃"


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    return export_to(trained.folder / "zero3", tmp_path_factory.mktemp("exported") / "hf", "float32")


@pytest.fixture
def command(capsys, monkeypatch):
    return lambda *arguments: call(generate.main, capsys, monkeypatch, "--device", "cpu", *arguments)


@pytest.mark.parametrize(
    "flags", [["--temperature", "0"], ["--seed", "7"], ["--seed", "7", "--top-k", "50", "--top-p", "0.9"]]
)
def test_a_run_and_its_export_say_the_same(trained, exported, command, flags):
    flags = ["--prompt", PROMPT, "--max-new-tokens", "24", *flags]
    said = [command(source, *flags) for source in (trained.folder / "zero3", exported)]
    assert [(done.code, done.err) for done in said] == [(0, "")] * 2
    assert said[0].out == said[1].out
    assert said[0].out.startswith(PROMPT)
    assert len(said[0].out) > len(PROMPT) + 8
    assert command(exported, *flags).out == said[0].out


def test_seeds_and_steps_make_a_difference(trained, command):
    flags = ["--prompt", PROMPT, "--max-new-tokens", "24"]
    choices = [["--seed", "1"], ["--seed", "2"], ["--seed", "1", "--step", "2"]]
    assert len({command(trained.folder / "zero2", *flags, *choice).out for choice in choices}) == 3


@pytest.mark.parametrize("name", MASKED)
def test_a_masked_run_and_its_export_say_the_same(trained, masked_exports, command, name):
    choices = [["--temperature", "0"], ["--seed", "7"], ["--seed", "7", "--top-k", "50", "--top-p", "0.9"]]
    choices += [["--seed", "7", "--unmasking-steps", "2"], ["--seed", "8"]]
    said = []
    for flags in choices:
        flags = ["--prompt", PROMPT, "--max-new-tokens", "40", *flags]
        run, export = (command(source, *flags) for source in (trained.folder / name, masked_exports[name]))
        assert (run.code, run.err) == (0, "")
        assert run == export
        assert run.out.startswith(PROMPT)
        said.append(run.out)
    assert len(set(said)) == len(said)
    assert "<mask>" not in "".join(said)


def test_finished_chunks_are_shown_while_the_next_one_is_made(trained, masked_exports):
    opened = open_trained(str(masked_exports["diffusion"]), None, "cpu", "float32")
    read = []
    opened.model.embed_tokens.register_forward_hook(lambda _module, inputs, _output: read.append(inputs[0].shape[1]))
    how = Namespace(
        max_new_tokens=30, temperature=0.0, top_k=None, top_p=None, seed=None, unmasking_steps=3, one_member=False
    )
    tokens = iter(generate.new_tokens(opened, torch.arange(10, 20), how))
    assert read == []
    for count in (6, 16, 8):  # to the end of the prompt's chunk of 16, a whole one, the rest
        assert opened.mask_id not in [next(tokens) for _ in range(count)]
        assert read[-3:] == [min(16, count + 10)] * 3 if count == 6 else read[-3:] == [count] * 3
    assert next(tokens, None) is None
    assert len(read) == 3 + 1 + 3 + 1 + 3  # three steps a chunk, and each finished chunk once


def test_a_mask_that_only_the_model_has(tmp_path, command):
    """A tokenizer without a mask token: the model's first further id is one, in the export too."""
    source = tmp_path / "tokenizer.json"
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(PROSE[:20], vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False)
    trained.save(str(source))
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    for vocabulary in (301, 300):
        config = ModelConfig(vocab_size=vocabulary, is_causal=False, **shape)
        save_hf(config, Llama(config, seed=0).state_dict().items(), tmp_path / f"hf{vocabulary}")
        info = open_tokenizer(source).info(source.name)
        write_hf_tokenizer(info, source, tmp_path / f"hf{vocabulary}", 64, mask_id=300 if vocabulary == 301 else None)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "hf301")
    assert (loaded.mask_token, loaded.mask_token_id) == ("<mask>", 300)
    assert loaded("a <mask>")["input_ids"][-1] == 300
    assert 300 not in loaded("a <mask>", split_special_tokens=True)["input_ids"]  # in text it is text, as in training
    opened = open_trained(str(tmp_path / "hf301"), None, "cpu", "float32")
    assert (opened.mask_id, opened.objective) == (300, None)
    assert opened.tokenizer.identity == open_tokenizer(source).identity
    flags = "--prompt", "Once", "--max-new-tokens", "8", "--seed", "1"
    assert command(tmp_path / "hf301", *flags).out.startswith("Once")
    assert "has no mask token: set model.vocab_size to at least 301" in command(tmp_path / "hf300", *flags).err


def test_the_prompt_can_come_from_standard_input(exported, command):
    flags = ["--max-new-tokens", "20", "--temperature", "0"]
    words = ["-m", "tools.generate", exported, "--prompt", "-", *flags]
    done = run_python(words, stdin=PROMPT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == command(exported, "--prompt", PROMPT, *flags).out


def test_an_empty_prompt_begins_a_document(exported, command):
    done = command(exported, "--prompt", "", "--max-new-tokens", "20", "--seed", "1")
    assert done.code == 0
    assert len(done.out) > 5


@pytest.mark.parametrize(
    ("source", "flags", "sentence"),
    [
        ("nothing", [], "nothing has no checkpoint: give the --output folder of a training run"),
        ("run", ["--step", "3"], "has no checkpoint of step 3; there are: 2, 4"),
        ("exported", ["--step", "2"], "--step 2 has no meaning for the exported model"),
        ("run", ["--temperature", "-1"], "temperature >= 0"),
        ("run", ["--temperature", "nan"], "temperature >= 0"),
        ("run", ["--top-p", "0"], "0 < top_p <= 1"),
        ("run", ["--top-k", "0"], "top_k >= 1"),
        ("run", ["--max-new-tokens", "0"], "--max-new-tokens 0: at least 1"),
        ("run", ["--unmasking-steps", "4"], "--unmasking-steps is for masked models; zero2/step-00000004 predicts the"),
        ("diffusion", ["--unmasking-steps", "0"], "--unmasking-steps 0: at least 1"),
        ("diffusion", ["--temperature", "-1"], "temperature >= 0"),
        ("masked", ["--top-p", "0"], "0 < top_p <= 1"),
        ("run", ["--seed", str(2**64)], f"--seed {2**64}: from 0 to 2**63 - 1"),
        ("run", ["--device", "gpu"], "--device gpu cannot be used here"),
        ("run", ["--device", "cuda:9"], "--device cuda:9 cannot be used here"),
    ],
)
def test_bad_input_is_one_sentence(trained, exported, tmp_path, command, source, flags, sentence):
    places = {"nothing": tmp_path / "nothing", "run": trained.folder / "zero2", "exported": exported}
    place = places.get(source, trained.folder / source)
    done = command(place, "--prompt", PROMPT, *flags)
    assert (done.code, done.out) == (2, "")
    assert sentence in done.err
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1


@pytest.fixture(scope="module", params=["sentencepiece", "byte fallback", "byte level"])
def any_tokenizer(request, tokenizer, exported):
    """Three ways of making characters from bytes: SentencePiece's, and two of the `tokenizers` library."""
    return open_tokenizer(
        {"sentencepiece": tokenizer, "byte fallback": exported / "tokenizer.json"}.get(request.param, DEEPSEEK)
    )


@given(prompt=awkward, continuation=awkward)
def test_streamed_pieces_are_whole_characters_and_add_up(any_tokenizer, prompt, continuation):
    before, after = (ids.tolist() for ids in any_tokenizer.encode_batch([prompt, continuation]))
    pieces = list(generate.stream(any_tokenizer, before, after))
    assert pieces[0] == any_tokenizer.decode(before)
    assert "".join(pieces) == any_tokenizer.decode([*before, *after])
    assert not any(generate.UNFINISHED in piece for piece in pieces)


# the third one replaces all bytes in a row when one of them is wrong, those already shown included
@pytest.mark.parametrize("any_tokenizer", ["sentencepiece", "byte level"], indirect=True)
@given(data=st.data())
def test_streamed_nonsense_adds_up_too(any_tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, 599), max_size=30))
    beyond = [*ids[:9], any_tokenizer.vocab_size, *ids[9:]]  # an id that only the model has
    assert "".join(generate.stream(any_tokenizer, [], beyond)) == any_tokenizer.decode(ids)


def test_a_character_is_shown_with_its_last_byte(tokenizer):
    opened = open_tokenizer(tokenizer)
    ids = opened.encode_batch(["a☃b"])[0].tolist()
    assert [opened.decode(ids[:n]).count(generate.UNFINISHED) for n in range(1, 5)] == [0, 1, 2, 0]
    assert list(generate.stream(opened, [], ids)) == ["", "a", "☃", "b", ""]
