"""The tutorial's pictures: those of a run's report as SVG, readable on light and on dark pages.

    python -m tools.docs.pictures runs/quickstart docs/pictures

Needs Playwright for Python and a Chromium.
"""

from __future__ import annotations

import argparse
import re
import shutil
import tempfile
from pathlib import Path

from evomerge.report.html import report_page
from evomerge.run.report import read_run

SHOWN = ("scores", "history", "recipe", "lineage")
_WIDTH = 760
_DRAW = """
async ([name, width]) => {
  const div = document.getElementById("picture-" + name), clear = "rgba(0,0,0,0)", line = "rgba(128,128,128,0.3)";
  const font = {...div.layout.font, color: "#75818e"};
  const layout = {...div.layout, font, paper_bgcolor: clear, plot_bgcolor: clear};
  for (const key of Object.keys(layout)) if (/^[xy]axis\\d*$/.test(key))
    layout[key] = {...layout[key], gridcolor: line, linecolor: line};
  layout.annotations = (layout.annotations || []).map(note => ({...note, bgcolor: clear}));
  const options = {format: "svg", width, height: layout.height, imageDataOnly: true};
  return Plotly.toImage({data: div.data, layout}, options);
}
"""


def draw(run: Path, folder: Path) -> list[Path]:
    """Writes NAME.svg for each picture.

    Args:
        run: A run folder.
        folder: Where to.

    Returns:
        What was written.
    """
    from playwright.sync_api import sync_playwright

    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as browsers:
        page_file = Path(scratch) / "report.html"
        page_file.write_text(report_page(read_run(run)), encoding="utf-8")
        browser = browsers.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": _WIDTH + 40, "height": 900})
        page.goto(page_file.as_uri())
        for name in SHOWN:
            path = folder / f"{name}.svg"
            path.write_text(_smaller(page.evaluate(_DRAW, [name, _WIDTH])) + "\n", encoding="utf-8")
            written.append(path)
        browser.close()
    return written


def _smaller(svg: str) -> str:
    """An SVG with no more digits than a screen shows."""
    return re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), svg)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("folder", type=Path, help="where to write the pictures")
    options = parser.parse_args()
    for picture in draw(options.run, options.folder):
        print(picture)
