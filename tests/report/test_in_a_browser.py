"""The page in a real browser: it shows every section, asks nothing of a network, follows the theme, fits a phone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest
from PIL import Image
from report_runs import make_fit, make_run, make_sweep

from sisa_dist.config import load_config
from sisa_dist.report.page import write_report
from sisa_dist.training.trainer import train

from runs import QUICKSTART  # isort: skip

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(NAMES)} is installed")

# What of the page is wider than the window, and which text stands outside its picture or, in one chart, over other text
# of an axis.
MEASURE = """<script>
const out = [], texts = [...document.querySelectorAll('figure svg text')];
for (const text of texts) {
  const box = text.getBoundingClientRect(), around = text.closest('figure').getBoundingClientRect();
  if (box.width && (box.left < around.left || box.right > around.right + 1 || box.bottom > around.bottom))
    out.push(text.textContent);
}
for (const svg of document.querySelectorAll('figure svg')) {
  const boxes = [...svg.querySelectorAll('text')].map(text => text.getBoundingClientRect()).filter(box => box.width);
  boxes.forEach((a, i) => boxes.slice(i + 1).forEach(b => {
    if (a.left < b.right && b.left < a.right && a.top + 2 < b.bottom && b.top + 2 < a.bottom)
      out.push('overlap in ' + svg.getAttribute('aria-label'));
  }));
}
const root = document.documentElement;
const wide = root.scrollWidth - root.clientWidth;
parent.postMessage(JSON.stringify({texts: texts.length, wide, width: innerWidth, out}), '*');
</script></body>"""
# No window is narrower than 500 pixels, but a frame is.
FRAME = """<!doctype html><script>onmessage = event => { document.title = event.data; }</script>
<iframe src="measured.html" width="WIDTH" height="2000" style="border:0"></iframe>"""


def browse(folder: Path, page: Path, *options: str, width: int = 1180, height: int = 2400) -> tuple[str, list[str]]:
    """What the browser prints, and what it writes on the page's console."""
    command = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--enable-logging=stderr",
    ]
    command += ["--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command += [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{height}", *options, page.as_uri()]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr[-2000:]
    return found.stdout, [line for line in found.stderr.splitlines() if "CONSOLE" in line]


def measure(folder: Path, page: Path, *, width: int) -> dict:  # type: ignore[type-arg]
    """By a script, in a copy that allows one."""
    text = page.read_text(encoding="utf-8")
    policy = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*>', text)
    assert policy is not None
    copy = folder / "measured.html"
    text = text.replace(policy.group(), "").replace("<details>", "<details open>").replace("</body>", MEASURE)
    copy.write_text(text, encoding="utf-8")
    frame = folder / "frame.html"
    frame.write_text(FRAME.replace("WIDTH", str(width)), encoding="utf-8")
    dom, _ = browse(folder, frame, "--dump-dom", "--virtual-time-budget=3000", width=1300)
    title = re.search(r"<title>(.*?)</title>", dom)
    assert title is not None
    return json.loads(unescape(title.group(1)))


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, tiny_overrides: list[str]) -> dict[str, Path]:
    """Of a run that was really trained beside others; of a sweep with a fit."""
    root = tmp_path_factory.mktemp("pages")
    asked = ["evaluation.positions={every: 8, seq_len: 128, windows: 3, buckets: 4}"]
    asked += ["evaluation.retrieval={every: 8, tasks: [niah], lengths: [160, 256], depths: [0, 1], items: 1}"]
    trained = train(load_config(QUICKSTART, [*tiny_overrides, *asked, f"output_dir={root / 'trained'}"]), quiet=True)
    others = [make_run(root / "learned", "model.d_s=16", learned=True), make_run(root / "plain", extras=False)]
    sweep = make_sweep(root / "grid", runs=10)
    make_fit(sweep)
    return {"runs": write_report([trained, *others], root / "runs.html"), "sweep": write_report([sweep])}


SECTIONS = {
    "runs": ["summary", "curves", "speed", "layers", "experts", "positions", "retrieval", "config"],
    "sweep": ["sweep", "fits", "summary", "curves", "speed", "layers", "config"],
}


@pytest.mark.parametrize("kind", SECTIONS)
def test_every_section_is_there_and_nothing_is_asked_for(kind: str, pages: dict[str, Path], tmp_path: Path) -> None:
    dom, console = browse(tmp_path, pages[kind], "--dump-dom")
    assert re.findall(r'<section id="(\w+)">', dom) == SECTIONS[kind]
    assert console == []
    text = pages[kind].read_text(encoding="utf-8")
    assert set(re.findall(r'(?:href|src)="([^"]*)"', text)) == {f"#{name}" for name in SECTIONS[kind]}
    assert not re.search(r"url\(|@import|<script|<link|<img", text)


def test_the_console_would_tell_of_a_request_and_of_a_script(pages: dict[str, Path], tmp_path: Path) -> None:
    text = pages["runs"].read_text(encoding="utf-8")
    for bad in ('<img src="https://example.invalid/x.png">', "<script>1</script>"):
        changed = tmp_path / "changed.html"
        changed.write_text(text.replace("</body>", f"{bad}</body>"), encoding="utf-8")
        assert browse(tmp_path, changed, "--dump-dom")[1]


@pytest.mark.parametrize("kind", SECTIONS)
@pytest.mark.parametrize("width", [1180, 420])
def test_nothing_is_wider_than_the_window_or_hides_another(
    kind: str, width: int, pages: dict[str, Path], tmp_path: Path
) -> None:
    found = measure(tmp_path, pages[kind], width=width)
    assert found["texts"] > 100 and found["width"] == width
    assert found["wide"] <= 0 and found["out"] == []


def test_it_follows_the_theme(pages: dict[str, Path], tmp_path: Path) -> None:
    brightness = {}
    for theme, options in (("light", []), ("dark", ["--force-dark-mode"])):
        picture = tmp_path / f"{theme}.png"
        browse(tmp_path, pages["runs"], f"--screenshot={picture}", *options)
        histogram = Image.open(picture).convert("L").histogram()
        brightness[theme] = sum(value * count for value, count in enumerate(histogram)) / sum(histogram)
        assert sum(count > 0 for count in histogram) > 60  # text and curves
    assert brightness["light"] > 220 and brightness["dark"] < 60
