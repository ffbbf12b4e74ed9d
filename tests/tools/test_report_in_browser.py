"""The page as a browser lays it out: nothing overlaps or is cut at any width, and its selectors work."""

import json
import re
import shutil
import subprocess

import pytest

from tests.tools.test_report import write_evaluations
from tests.tools.test_run_plots import write_long_run
from tools.report import page
from tools.run_history import read_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WIDTHS = (360, 400, 720, 800, 1600)
# In the page: when the curves are drawn, tell the frame around it where everything is, then the same over hours.
MEASURE = """
<script>
const box = node => { const r = node.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
const boxes = (place, selector) => [...place.querySelectorAll(selector)].map(node => [node.textContent, box(node)]);
const look = () => {
  const plots = [document.getElementById("plot"), document.getElementById("context")];
  const texts = ".annotation-text, .legendtext, [class$=tick] text, text[class$=title]";
  return {
    width: innerWidth, page: document.documentElement.scrollWidth,
    texts: plots.map(plot => boxes(plot, texts)),
    x: plots[0].querySelector("text[class^=x][class$=title]").textContent, last: plots[0]._fullData[0].x.slice(-1)[0],
    smooth: plots[0].data.filter(trace => trace.visible !== false && trace.meta.role === "strong").length,
    split: [...document.querySelectorAll(".numbers td")].filter(cell => cell.getClientRects()[0].height > 40).length,
  };
};
const wait = setInterval(async () => {
  if (document.querySelectorAll("#context .legendtext").length < 2) return;
  clearInterval(wait);
  const first = look();
  document.getElementById("axis").value = "hours";
  document.getElementById("smoothing").value = "strong";
  document.getElementById("axis").dispatchEvent(new Event("change"));
  setTimeout(() => parent.postMessage([first, look()], "*"), 500);
}, 100);
</script>
"""
FRAME = """
<script>
addEventListener("message", event => {
  document.body.append(Object.assign(document.createElement("pre"), {textContent: JSON.stringify(event.data)}));
});
</script>
"""


def overlap(a: list[float], b: list[float]) -> bool:
    return min(a[2], b[2]) - max(a[0], b[0]) > 1 and min(a[3], b[3]) - max(a[1], b[1]) > 1


@pytest.mark.skipif(CHROMIUM is None, reason="needs the Chromium browser")
def test_nothing_overlaps_at_any_width_and_the_selectors_work(tmp_path):
    write_evaluations(write_long_run(tmp_path))
    (tmp_path / "page.html").write_text(page(read_run(tmp_path)).replace("</body>", MEASURE + "</body>"))
    frames = [f'<iframe src="page.html" style="width:{width}px;height:3000px"></iframe>' for width in WIDTHS]
    (tmp_path / "frames.html").write_text(f"<body>{FRAME}{''.join(frames)}</body>")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=60000", "--window-size=1700,3000"]
    command = [CHROMIUM, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", tmp_path / "frames.html"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=300).stdout
    measured = [json.loads(text) for text in re.findall("<pre>(.*?)</pre>", shown)]
    assert sorted(first["width"] for first, _ in measured) == list(WIDTHS)
    for first, second in measured:
        assert (first["x"], second["x"], second["last"]) == (
            "optimizer step",
            "hours of training",
            pytest.approx(200 / 60),
        )
        assert (first["smooth"], second["smooth"]) == (0, 5)
        for look in (first, second):
            assert look["page"] <= look["width"], "the page scrolls to the side"
            assert look["split"] == 0, "a cell of a table is broken into lines"
            for texts in look["texts"]:
                assert len(texts) > 20
                for number, (text, where) in enumerate(texts):
                    assert where[0] >= 0, text
                    assert where[2] <= look["width"], text
                    assert not [other for other, there in texts[:number] if overlap(where, there)], (
                        text,
                        look["width"],
                    )
