"""Where evaluations of a run are kept, for the report: RUN/evaluations/CHECKPOINT-DATA-FINGERPRINT-SPLIT-ANALYSIS.json.

One file for each analysis of a checkpoint on a split of a data set; a later one replaces it, and only it.
"""

import json
from pathlib import Path
from typing import Any

from storage.atomic import write_atomically

FOLDER = "evaluations"


def store_evaluation(run: Path, about: dict[str, Any], analyses: dict[str, Any]) -> None:
    """`about` names `checkpoint`, `data`, `fingerprint` and `split`; `analyses` are JSON-able figures by name."""
    (run / FOLDER).mkdir(exist_ok=True)
    data = Path(about["data"]).name
    place = f"{about['checkpoint']}-{data}-{about['fingerprint'][:8]}-{about['split']}"
    for name, figures in analyses.items():
        path = run / FOLDER / f"{place}-{name.replace('_', '-')}.json"
        write_atomically(path, json.dumps(about | {name: figures}, indent=1).encode())


def read_evaluations(run: Path) -> list[dict[str, Any]]:
    """All that are kept, in the order of checkpoints; ValueError for a damaged file."""
    found = []
    for path in sorted((run / FOLDER).glob("*.json")):
        try:
            found.append(json.loads(path.read_bytes()))
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON ({error}): remove it and evaluate again") from None
    return found
