"""Documents of several scripts, and code."""

import inspect
import json.decoder
from pathlib import Path

from tests.data_prep.texts import PROSE, write_lines

CHINESE = "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。\n" * 12
ARABIC = "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق. وقد وهبوا عقلاً وضميرًا.\n" * 12
CODE = inspect.getsource(json.decoder)
HOSTILE = "<script>document.body.remove()</script>\x07\u202e &amp; "


def write_scripts(folder: Path) -> Path:
    """One .jsonl of Latin, Han and Arabic texts, of code, and of text that must stay text."""
    texts = {"chinese": CHINESE, "arabic": ARABIC, "code": CODE, "hostile": HOSTILE + PROSE[0]}
    records = [{"id": f"{name} <b>", "domain": name, "text": text} for name, text in texts.items()]
    records += [{"id": f"en{i}", "domain": "english", "text": text} for i, text in enumerate(PROSE[:12])]
    return write_lines(folder / "scripts.jsonl", [*records, records[0] | {"id": "again"}])
