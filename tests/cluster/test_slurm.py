"""The README's Slurm script under a real Slurm: a request to stop, and a node that is lost."""

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.checkpoint.manifest import read_manifest, steps
from tests.cluster.slurm import Slurm, missing_slurm
from tests.cluster.test_hosts import losses
from tests.forks import run_python
from tests.processes import CODE
from tests.test_readme import README

FLAGS = ["--training.max_steps", "120", "--checkpoint.every_steps", "10"]
OPTIONS = ["--ntasks-per-node=1", "--cpus-per-task=1", "--output=job.log"]


@pytest.fixture
def slurm(cluster) -> Slurm:
    if reason := missing_slurm():
        pytest.skip(reason)
    return Slurm(cluster)


def test_a_job_goes_on_after_a_request_to_stop_and_on_another_node(slurm, cluster, shared, tmp_path):
    """Slurm queues the job again by itself once a node is lost; the end is that of a run that nothing happened to."""
    folder = cluster.folder / "job"
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/activate").touch()
    for name in (*CODE, "data", "recipe.yaml"):
        (folder / name).symlink_to(shared / name)
    (script,) = [block for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) if "#SBATCH" in block]
    script = script.replace("#SBATCH --gpus-per-node=8\n", "").replace("zero3.json", "zero3_fp32.json")
    script = re.sub(r"recipes/\S+", "recipe.yaml", script).replace("--output run", " ".join(["--output run", *FLAGS]))
    (folder / "job.sh").write_text(script)
    run, job = folder / "run", slurm.tell("sbatch", "--parsable", *OPTIONS, "job.sh", cwd=folder).strip()

    def wait(reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not reached():
            assert time.monotonic() < deadline, f"{slurm.job(job)}\n{(folder / 'job.log').read_text()}"
            time.sleep(0.3)

    def trains_after(step: int) -> bool:
        return (run / "metrics.jsonl").exists() and max(losses(run), default=0) > step

    wait(lambda: trains_after(10))
    slurm.tell("scancel", "--signal=USR1", job)  # as Slurm does before the time limit
    wait(lambda: slurm.job(job)["Restarts"] == "1")
    saved = read_manifest(steps(run)[0]).state.step
    assert saved < 120
    wait(lambda: trains_after(saved))
    assert slurm.job(job)["NodeList"] == "node[1-2]"
    cluster.kill("node2")
    wait(lambda: slurm.job(job)["JobState"] == "COMPLETED")
    assert slurm.job(job)["Restarts"] == "2"
    assert slurm.job(job)["NodeList"] == "node[1,3]"

    whole = tmp_path / "run"
    command = ["train.py", "--recipe", "recipe.yaml", "--deepspeed_config", "ds_configs/zero3_fp32.json"]
    done = run_python([*command, "--data", "data", "--output", str(whole), *FLAGS], ranks=2, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert losses(run) == losses(whole)
    assert sorted(losses(run)) == list(range(1, 121))
    assert weights_and_moments(run) == weights_and_moments(whole)


def weights_and_moments(run: Path) -> dict:
    """The hashes of the files with them in the last checkpoint."""
    files = read_manifest(steps(run)[0]).files
    return {name: file for name, file in files.items() if "optim_states" in name}
