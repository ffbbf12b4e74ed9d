"""A manifest is believed only where recipe, data and progress can be true together, whatever digest it carries."""

import re
from pathlib import Path

import pytest

from engine.checkpoint.manifest import CheckpointManifest, read_manifest, seal
from tests.engine.checkpoint.test_folder import write


def seal_with(folder: Path, section: str, place: tuple, value) -> None:
    """Change one value of a manifest, and its digest with it."""
    fields = read_manifest(folder).model_dump(mode="json")
    at = fields[section] if place else fields
    for part in place[:-1]:
        at = at[part]
    at[place[-1] if place else section] = value
    (folder / "manifest.json").write_bytes(seal(CheckpointManifest.model_validate(fields)))


FOREIGN = [
    # a place that is read, and what another run, an editor or a fault may have put there under a digest of its own
    ("files", (), {}, "it names no files"),
    ("recipe", (), {}, "recipe.model: Field required"),
    ("data", (), {}, "data.path: Field required"),
    ("recipe", ("model", "hidden_size"), "wide", "recipe.model.hidden_size: "),
    ("recipe", ("model",), [], "recipe.model: "),
    ("recipe", ("objective",), {"name": "unheard"}, "recipe.objective"),
    ("recipe", ("training", "seed"), 1, "its seed is 0, the recipe's 1"),
    ("recipe", ("training", "global_batch_tokens"), 1024, "its last step had 512 tokens, the recipe's have 1024"),
    ("data", ("tokenizer",), 5, "data.tokenizer: "),
    ("data", ("sources", "books"), {}, "data.sources.books.documents: "),
    ("data", ("stages", 0, "fingerprint"), "g", "its last step used other data (f) than it names (g)"),
    ("data", ("stages", 0, "seq_length"), 32, "its last step had 8 rows of 32 for 512 tokens"),
    ("data", ("stages", 0, "first_step"), None, "data.stages.0.first_step: "),
    ("state", ("consumed_samples",), 20, "its history adds up to [5, 40, 2560]"),
    ("state", ("consumed_tokens",), 2561, "its history adds up to [5, 40, 2560]"),
    ("state", ("stage_samples",), [10], "step 5 has 1 stages behind it, not 0"),
    ("state", ("stage_samples",), [50], "its stages used [50] samples, all together 40"),
    ("state", ("skipped_steps",), 6, "0 steps skipped in a row, 6 in all, of 5"),
    ("state", ("consecutive_skipped_steps",), 1, "1 steps skipped in a row, 0 in all, of 5"),
    ("state", ("batches",), [[6, 8, 512]], "its history adds up to [6, 48, 3072]"),
    ("state", ("data_fingerprint",), "g", "its last step used other data (g) than it names (f)"),
]


@pytest.mark.parametrize(("section", "place", "value", "words"), FOREIGN)
def test_a_manifest_whose_parts_do_not_belong_together_is_damaged(tmp_path, section, place, value, words):
    folder = write(tmp_path, 5)
    seal_with(folder, section, place, value)
    with pytest.raises(ValueError, match=re.escape(words)) as raised:
        read_manifest(folder)
    assert "\n" not in str(raised.value)


def test_a_history_that_began_late_bounds_the_totals(tmp_path):
    """As in a run that is older than the history."""
    folder = write(tmp_path, 5)
    seal_with(folder, "state", ("batches",), [[2, 8, 512]])
    assert read_manifest(folder).state.step == 5
    seal_with(folder, "state", ("batches",), [])
    assert read_manifest(folder).state.consumed_samples == 40
