"""A bench on several ranks: the module starts itself again, once a rank."""

import json
import subprocess
import sys
from pathlib import Path


def run_ranks(module: str, ranks: int, folder: Path, steps: int) -> dict[str, list[dict]]:
    """What the first rank wrote into FOLDER/results.json: by contender a record for each step."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    subprocess.run([*launcher, "-m", module, "--steps", str(steps), "--rank-of", folder], check=True)
    return json.loads((folder / "results.json").read_text())
