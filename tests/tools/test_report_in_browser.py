"""The page as a browser lays it out: nothing overlaps or is cut at any width, all is drawn, and its selectors work."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.tools.test_report import write_evaluations
from tests.tools.test_run_plots import write_layers, write_long_run
from tools.comparison import read_runs
from tools.report import comparison_page, page
from tools.run_history import read_run
from tools.shown import LAYER_FIGURES, SERIES

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


# In the page: once all is drawn, say on the console how many of its plots are, each with something in it.
COUNT = """
<script>
const started = setInterval(() => {
  const plots = [...document.querySelectorAll("#plot, #context:not([hidden])")];
  if (plots.some(plot => !plot._fullLayout || !plot.querySelector(".cartesianlayer > .subplot"))) return;
  clearInterval(started);
  const marks = ".scatterlayer path, .scatterlayer .point, .heatmaplayer image";
  const all = plots.flatMap(plot => [...plot.querySelectorAll(".cartesianlayer > .subplot")]);
  const drawn = all.filter(subplot => subplot.querySelector(marks)).length;
  const expected = plots.map(plot => plot._fullLayout._subplots.cartesian.length).reduce((a, b) => a + b);
  const dark = getComputedStyle(document.body).backgroundColor === "rgb(15, 18, 23)";
  if (document.getElementById("steps")) {
    document.getElementById("plot").emit("plotly_click", {points: [{data: {type: "scatter"}, customdata: 25}]});
    console.log(document.getElementById("ledger").textContent);
  }
  console.log(["plots", innerWidth, dark ? "dark" : "light", drawn, "of", expected].join(" "));
}, 100);
</script>
"""
PICTURES = Path(__file__).parents[2] / "pictures"
"""What the pages look like, kept for people; git ignores it."""


def run_chromium(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Without a network."""
    always = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=60000", "--hide-scrollbars"]
    always += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'profile'}"]
    return subprocess.run([CHROMIUM, *always, *flags], capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(CHROMIUM is None, reason="needs the Chromium browser")
def test_everything_is_drawn_in_both_schemes_and_nothing_is_said_on_the_console(tmp_path):
    """At 400 and 1,280 pixels, a run and two runs on one page; the pictures stay in `pictures/`."""
    runs = [tmp_path / name for name in ("first", "second")]
    for run in runs:
        run.mkdir()
        write_evaluations(write_layers(write_long_run(run)))
    pages = {"run": page(read_run(runs[0])), "runs": comparison_page(read_runs(runs))}
    frames = ""
    for name, text in pages.items():
        (tmp_path / f"{name}.html").write_text(text.replace("</body>", COUNT + "</body>"))
        for width in (400, 1280):
            frames += f'<iframe src="{name}.html" style="width:{width}px;height:6000px;border:0"></iframe>'
    (tmp_path / "frames.html").write_text(f'<body style="margin:0;white-space:nowrap">{frames}</body>')
    PICTURES.mkdir(exist_ok=True)
    for scheme, setting in (("light", "1"), ("dark", "0")):
        picture = PICTURES / f"report-{scheme}.png"
        picture.unlink(missing_ok=True)
        flags = [f"--screenshot={picture}", "--window-size=3400,6000", "--enable-logging=stderr"]
        flags.append(f"--blink-settings=preferredColorScheme={setting}")
        said = run_chromium(tmp_path, *flags, str(tmp_path / "frames.html")).stderr
        console = [line.split('"')[1] for line in said.splitlines() if "CONSOLE" in line]
        of_run, of_runs = len(SERIES) + 2 + len(LAYER_FIGURES) + 6, len(SERIES) + 1
        expected = [f"plots {width} {scheme} {n} of {n}" for width in (400, 1280) for n in (of_run, of_runs)]
        expected += [f"python -m tools.ledger {runs[0]} --step 25"] * 2
        assert sorted(console) == sorted(expected)
        assert picture.stat().st_size > 50_000


def overlap(a: list[float], b: list[float]) -> bool:
    return min(a[2], b[2]) - max(a[0], b[0]) > 1 and min(a[3], b[3]) - max(a[1], b[1]) > 1


@pytest.mark.skipif(CHROMIUM is None, reason="needs the Chromium browser")
def test_nothing_overlaps_at_any_width_and_the_selectors_work(tmp_path):
    write_evaluations(write_layers(write_long_run(tmp_path)))
    (tmp_path / "page.html").write_text(page(read_run(tmp_path)).replace("</body>", MEASURE + "</body>"))
    frames = [f'<iframe src="page.html" style="width:{width}px;height:3000px"></iframe>' for width in WIDTHS]
    (tmp_path / "frames.html").write_text(f"<body>{FRAME}{''.join(frames)}</body>")
    shown = run_chromium(tmp_path, "--window-size=1700,3000", "--dump-dom", str(tmp_path / "frames.html")).stdout
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
