"""What `tools.export` writes is what the engine held, for `transformers` and for people; nothing is half-written."""

import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    GenerationConfig,
    pipeline,
)

from data_prep.tokenizer import open_tokenizer
from engine.checkpoint.manifest import steps
from model.config import ModelConfig
from model.hf.weights import load_hf
from storage.shards import open_split
from tests.data_prep.texts import PROSE
from tests.forks import start_python
from tests.processes import run_cli, start_cli
from tests.tools.called import call
from tests.tools.large_run import LargeRun, anonymous_bytes, with_all_imports, write_large_run
from tests.tools.trained import LAYOUTS, MASKED
from tools import export
from tools.trained import remembered_objective
from training.records import read_records
from training.sections import ObjectiveConfig

TEXT = "O, for a Muse of fire — that would ascend\n\nthe brightest heaven of invention, 1599! ☃"


@pytest.fixture
def command(capsys, monkeypatch):
    return lambda *arguments: call(export.main, capsys, monkeypatch, *arguments)


@pytest.fixture(scope="module")
def rows(trained) -> torch.Tensor:
    dataset = open_split(trained.data, "validation")
    ids = np.stack([np.asarray(dataset.row("plays", row).ids) for row in range(4)])
    return torch.from_numpy(ids.astype(np.int64))


def logits(model, rows: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result = model(rows)
    return getattr(result, "logits", result).float()


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", LAYOUTS)
def test_transformers_computes_what_the_engine_did(trained, rows, tmp_path, command, name):
    assert command(trained.folder / name, "--output", tmp_path / "hf", "--dtype", "float32").code == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(loaded).__name__ == "LlamaForCausalLM"
    assert loaded.dtype == torch.float32
    torch.testing.assert_close(logits(loaded, rows), logits(trained.live(name), rows), atol=1e-5, rtol=0)
    written = dict(load_hf(tmp_path / "hf")[1])
    assert written.keys() == trained.weights[name].keys()
    assert all(np.array_equal(written[key].numpy(), value) for key, value in trained.weights[name].items())


def test_transformers_fills_in_what_the_engine_did(trained, rows, tmp_path, command, monkeypatch, capsys):
    """Masked models: the same logits in whole, packed and padded rows; the model card says how to get them."""
    for name in MASKED:
        assert command(trained.folder / name, "--output", tmp_path / name, "--dtype", "float32").code == 0
        loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / name, trust_remote_code=True)
        expected = logits(trained.live(name), rows)
        torch.testing.assert_close(logits(loaded, rows), expected, atol=1e-5, rtol=0)
        later = rows.clone()
        later[:, 40:] = rows[:, 40:].flip(1)
        changed = (logits(loaded, later)[:, :32] - expected[:, :32]).abs().amax()
        assert (changed > 1e-4) == (name == "masked")  # who sees the future
        padding = torch.full((len(rows), 7), loaded.config.pad_token_id)
        left, right = torch.cat([padding, rows], 1), torch.cat([rows, padding], 1)
        for padded, kept in ((left, slice(7, None)), (right, slice(-7))):
            mask = torch.zeros_like(padded)
            mask[:, kept] = 1
            with torch.no_grad():
                found = loaded(padded, attention_mask=mask).logits[:, kept]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        text = (tmp_path / name / "README.md").read_text()
        assert yaml.safe_load(text.split("---\n")[1])["pipeline_tag"] == "fill-mask"
        assert {"masked": "predict 30% of", "diffusion": "from their own chunk of 16 tokens"}[name] in text
        monkeypatch.chdir(tmp_path)
        capsys.readouterr()
        exec(re.search(r"```python\n(.*?)```", text, re.S)[1], found := {})
        assert "trust_remote_code" not in capsys.readouterr().out  # transformers has no question left
        assert int((found["inputs"]["input_ids"] == found["tokenizer"].mask_token_id).sum()) == 1
        assert found["logits"].shape == (*found["inputs"]["input_ids"].shape, 600)
        fill = pipeline("fill-mask", str(tmp_path / name), trust_remote_code=True, device="cpu")
        best = fill(found["text"], top_k=1)
        hidden = found["inputs"]["input_ids"][0] == found["tokenizer"].mask_token_id
        assert best[0]["token"] == int(logits(trained.live(name), found["inputs"]["input_ids"])[0, hidden].argmax())


def test_a_masked_model_is_not_taken_for_another_one(trained, rows, tmp_path, command):
    for name, folder in (("masked", tmp_path / "full"), ("diffusion", tmp_path / "chunks")):
        assert command(trained.folder / name, "--output", folder, "--dtype", "float32").code == 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    assert type(plain).__name__ == "LlamaForCausalLM"
    torch.testing.assert_close(logits(plain, rows), logits(trained.live("masked"), rows), atol=1e-5, rtol=0)
    for loader in (AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM):
        with pytest.raises(ValueError, match="trust_remote_code"):
            loader.from_pretrained(tmp_path / "chunks", trust_remote_code=False)
    for folder, objective in (("full", trained_for("masked")), ("chunks", trained_for("diffusion"))):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert ObjectiveConfig(**config["objective"]).ratios == objective.ratios
        assert config["mask_token_id"] == AutoTokenizer.from_pretrained(tmp_path / folder).mask_token_id == 4
        assert config["use_cache"] is False
        remembered = remembered_objective(tmp_path / folder / "config.json", ModelConfig.from_hf(config))
        assert remembered.name == objective.name


def trained_for(name: str) -> ObjectiveConfig:
    keys = {tuple(key.split(".")): yaml.safe_load(value) for key, value in MASKED[name][1].items()}
    return ObjectiveConfig(**{key: value for (section, key), value in keys.items() if section == "objective"})


def test_tokenizer_and_generation_settings_are_those_of_training(trained, tmp_path, command):
    done = command(trained.folder / "zero2", "--output", tmp_path / "hf")
    assert done.code == 0
    ours = open_tokenizer(trained.data / "tokenizer")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert loaded.encode("</s>", add_special_tokens=False) == [ours.eos_id]
    for text in (TEXT, PROSE[50]):
        assert loaded(text)["input_ids"] == [ours.bos_id, *ours.encode_batch([text])[0].tolist()]
    settings = GenerationConfig.from_pretrained(tmp_path / "hf")
    for kind in ("bos", "eos", "pad"):
        assert getattr(settings, f"{kind}_token_id") == getattr(ours, f"{kind}_id") is not None
    rows = open_split(trained.data, "train").manifest.seq_length
    assert loaded.model_max_length == AutoConfig.from_pretrained(tmp_path / "hf").max_position_embeddings == rows
    said = f"max_position_embeddings is {rows}, the tokens of a row in training, not the recipe's 128\n"
    assert done.err.count(said) == 1


def test_model_card_says_where_the_model_comes_from(trained, tmp_path, command):
    run = trained.folder / "zero2"
    assert command(run, "--output", tmp_path / "some model").code == 0
    header, text = re.fullmatch(
        r"---\n(.*?)\n---\n(.*)", (tmp_path / "some model/README.md").read_text(), re.S
    ).groups()
    assert yaml.safe_load(header)["library_name"] == "transformers"
    manifest = open_split(trained.data, "train").manifest
    (validation,) = [
        r["validation"] for r in read_records(run / "metrics.jsonl") if "validation" in r and r["step"] == 4
    ]
    for part in (
        "# some model",
        f"A LlamaForCausalLM with {sum(value.size for value in trained.weights['zero2'].values()):,} parameters",
        "for 4 optimizer steps on 3,072 tokens",
        manifest.fingerprint,
        *(f"| {name} | {s.documents:,} | {s.bytes:,} | {s.tokens:,} |" for name, s in manifest.splits["train"].items()),
        f"| validation | 4 | {validation['validation']['loss']:.4f} | {validation['validation']['bits_per_byte']:.4f} |",
        "peak learning rate 0.01",
        "`step-00000004`",
    ):
        assert part in text
    assert "$" not in text


def test_bfloat16_is_the_default_and_rounds_once(trained, tmp_path, command):
    assert command(trained.folder / "zero3", "--output", tmp_path / "hf").code == 0
    assert json.loads((tmp_path / "hf/config.json").read_text())["dtype"] == "bfloat16"
    for name, tensor in load_hf(tmp_path / "hf")[1]:
        assert torch.equal(tensor, torch.from_numpy(trained.weights["zero3"][name]).bfloat16())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").dtype == torch.bfloat16


def test_shards_stay_below_the_given_size(trained, rows, tmp_path, command):
    arguments = "--max-shard-gb", "0.0001", "--dtype", "float32"
    assert command(trained.folder / "zero2", "--output", tmp_path / "hf", *arguments).code == 0
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "hf").glob("model-*-of-*.safetensors"))
    assert set(index["weight_map"].values()) == {path.name for path in shards}
    assert len(shards) >= 3
    assert all(path.stat().st_size < 102_000 for path in shards)
    assert index["metadata"]["total_size"] == 4 * sum(value.size for value in trained.weights["zero2"].values())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    torch.testing.assert_close(logits(loaded, rows), logits(trained.live("zero2"), rows), atol=1e-5, rtol=0)


def test_everyone_who_may_read_the_folder_may_read_its_files(trained, tmp_path, command):
    assert command(trained.folder / "zero2", "--output", tmp_path / "hf").code == 0
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "hf").iterdir()}
    assert modes == {(tmp_path / "hf").stat().st_mode & 0o666}


def test_the_step_can_be_chosen(trained, tmp_path, command):
    assert (
        command(trained.folder / "zero1", "--output", tmp_path / "early", "--step", "2", "--dtype", "float32").code == 0
    )
    assert "for 2 optimizer steps on 1,536 tokens" in (tmp_path / "early/README.md").read_text()
    assert "| validation | 2 |" in (tmp_path / "early/README.md").read_text()
    written = dict(load_hf(tmp_path / "early")[1])
    assert not any(np.array_equal(written[key].numpy(), value) for key, value in trained.weights["zero1"].items())
    done = command(trained.folder / "zero1", "--output", tmp_path / "none", "--step", "3")
    assert done.code == 2
    assert done.err == f"error: {trained.folder / 'zero1'} has no checkpoint of step 3; there are: 2, 4\n"
    assert files(tmp_path) == ["early"]


def test_what_stands_in_the_way_is_left_alone(trained, tmp_path, command):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/note").write_text("keep")
    for place in ("folder", "folder/note"):
        done = command(trained.folder / "zero2", "--output", tmp_path / place)
        assert done.code == 2
        assert done.err == f"error: --output {tmp_path / place} exists already: give a folder that is new or empty\n"
    assert (tmp_path / "folder/note").read_text() == "keep"
    (tmp_path / "empty").mkdir()
    assert command(trained.folder / "zero2", "--output", tmp_path / "empty").code == 0
    assert "config.json" in files(tmp_path / "empty")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{tmp}/nothing"], "{tmp}/nothing has no checkpoint: give the --output folder of a training run"),
        (["{run}", "--max-shard-gb", "0"], "--max-shard-gb 0: more than 0"),
        (["{run}", "--max-shard-gb", "nan"], "--max-shard-gb nan: more than 0"),
    ],
)
def test_bad_input_is_one_sentence(trained, tmp_path, command, arguments, sentence):
    names = {"tmp": tmp_path, "run": trained.folder / "zero2"}
    done = command(*(argument.format(**names) for argument in arguments), "--output", tmp_path / "hf")
    assert (done.code, done.err) == (2, f"error: {sentence.format(**names)}\n")
    assert files(tmp_path) == []


def test_a_damaged_checkpoint_is_passed_over_aloud(trained, tmp_path, command):
    run = tmp_path / "run"
    shutil.copytree(trained.folder / "zero2", run)
    newest, older = steps(run)
    flip_a_bit(max(newest.glob("*optim_states.pt")))
    done = command(run, "--output", tmp_path / "hf")
    assert done.code == 0
    assert done.err.startswith("damaged checkpoint passed over: ")
    assert f"{older} exported to" in done.out
    assert "`step-00000002`" in (tmp_path / "hf/README.md").read_text()
    done = command(run, "--output", tmp_path / "asked", "--step", "4")
    assert done.code == 2
    assert "its content has changed since it was written" in done.err
    flip_a_bit(older / "mp_rank_00_model_states.pt")
    done = command(run, "--output", tmp_path / "none")
    assert done.code == 2
    assert "every checkpoint is damaged" in done.err
    assert files(tmp_path) == ["hf", "run"]


@pytest.fixture(scope="module")
def large(trained, tmp_path_factory) -> Iterator[LargeRun]:
    folder = tmp_path_factory.mktemp("large")
    yield write_large_run(trained, folder)
    shutil.rmtree(folder)


def in_small_files(run: Path, output: Path) -> list[str]:
    words = ["-m", "tools.export", run, "--output", output, "--max-shard-gb", "0.03"]
    return [*map(str, words), "--dtype", "float32"]


def test_ctrl_c_leaves_nothing(large, tmp_path):
    with start_python(in_small_files(large.folder, tmp_path / "hf")) as running:
        running.wait_for(lambda: (tmp_path / ".hf.partial/.model-00002.part").exists())
        running.send_signal(signal.SIGINT)
        done = running.finish()
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    assert files(tmp_path) == []


def test_a_full_disk_ends_in_a_sentence_and_leaves_nothing(large, tmp_path):
    limited = [
        "bash",
        "-c",
        'ulimit -f 20000; exec "$@"',
        "bash",
        sys.executable,
        *in_small_files(large.folder, tmp_path / "hf"),
    ]
    done = run_cli(limited)
    assert done.returncode == 2
    notice, error = done.stderr.splitlines()
    assert notice.startswith("max_position_embeddings is 96, ")
    assert error.startswith("error: the file size limit is reached: make room and run the same command again")
    assert files(tmp_path) == []


def test_a_killed_export_is_repeated_in_memory_that_does_not_grow_with_the_checkpoint(large, tmp_path):
    output, command = tmp_path / "hf", in_small_files(large.folder, tmp_path / "hf")
    with start_python(command) as running:
        running.wait_for(lambda: (tmp_path / ".hf.partial/.model-00002.part").exists())
        running.kill_all(signal.SIGKILL)
    assert files(tmp_path) == [".hf.partial"]
    # glibc then gives every large block back when it is freed: what is measured is what is held, not what is fragmented
    with start_cli([sys.executable, *command], env={"MALLOC_MMAP_THRESHOLD_": "1000000"}) as running:
        samples = []
        while running.process.poll() is None:
            samples.append(anonymous_bytes(running.process.pid))
            time.sleep(0.002)
        assert running.finish().returncode == 0
    assert files(tmp_path) == ["hf"]
    assert not list(output.glob(".*"))
    assert large.bytes > 4e8
    assert max(samples) - with_all_imports() < large.bytes / 4
    tensors = dict(load_hf(output)[1])
    assert tensors.keys() == large.starts.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor.flatten(), large.values(large.starts[name], tensor.numel())), name
    shutil.rmtree(output)


def test_that_measure_of_memory_tells_a_copy_from_a_mapped_file(large):
    before = anonymous_bytes(os.getpid())
    mapped = torch.load(large.shards[0], mmap=True)["optimizer_state_dict"]["single_partition_of_fp32_groups"][0]
    assert float(mapped.max()) == 65520
    assert anonymous_bytes(os.getpid()) - before < large.bytes / 8
    copied = mapped.clone()
    assert anonymous_bytes(os.getpid()) - before > large.bytes * 0.4
    assert torch.equal(copied[:100], mapped[:100])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
