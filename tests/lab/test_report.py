"""The report of a run: whole in one file, escaped, and the same for the same files, whatever they hold."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from support.lab_files import sample, write_files

from aioengine.errors import ConfigError
from aioengine.lab.analysis.summary import summarize
from aioengine.lab.report.charts import images
from aioengine.lab.report.run_page import PLOTS, load_run, thin, write_report
from aioengine.lab.runs.rows import load_frames

pytest.importorskip("vl_convert", reason="of the extra")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with its report."""
    folder = write_files(tmp_path_factory.mktemp("report") / "run")
    (folder / "summary.json").write_text(json.dumps(summarize(folder)))
    write_report(folder)
    return folder


class Links(HTMLParser):
    """What a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "srcset", "href")]


def charts_of(page: str) -> list[dict[str, Any]]:
    found = re.search(r'<script type="application/json" id="charts">(.*?)</script>', page, flags=re.DOTALL)
    assert found is not None
    return json.loads(found[1])["charts"]  # type: ignore[no-any-return]


def test_the_page_is_whole_and_escaped(written: Path) -> None:
    text = (written / "report.html").read_text()
    links = Links()
    links.feed(text)
    assert links.sources == [] and links.tags.count("script") == 2, "nothing is fetched"
    assert "vegaEmbed" in text and len(charts_of(text)) == len(PLOTS)
    assert "&lt;b&gt;fcfs" in text and "<b>fcfs" not in text
    assert "aioengine lab run --experiment FOLDER/experiment.json" in text
    assert str(written) not in text
    for name in PLOTS:
        assert (written / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_timeline_has_every_stay(written: Path) -> None:
    charts = charts_of((written / "report.html").read_text())
    [timeline] = [chart for chart in charts if "stays of" in str(chart["title"])]
    stays = [
        (row["slot"], row["adapter"], row["start"], row["end"], row["steps"])
        for row in timeline["datasets"]["rows"]
    ]
    spans = load_frames(written).slots.sort("start", "slot")
    assert stays == spans.select("slot", "adapter", "start", "end", "busy_steps").rows()


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"cannot read .*summary\.json"):
        write_report(folder)
    (folder / "summary.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        write_report(folder)


@pytest.mark.slow
def test_figures_for_a_paper(written: Path, tmp_path: Path) -> None:
    unwritten = shutil.ignore_patterns("report.html", "figures")
    folder = shutil.copytree(written, tmp_path / "run", ignore=unwritten)
    write_report(folder, vector=True)
    for path in (written / "report.html", *written.glob("figures/*.png")):
        assert (folder / path.relative_to(written)).read_bytes() == path.read_bytes()
    figures = folder / "figures"
    names = set(PLOTS)
    for kind in ("pdf", "svg"):
        assert {path.stem for path in figures.glob(f"*.{kind}")} == names
    assert b"/FontFile" in (figures / "latency.pdf").read_bytes(), "the fonts are in it"
    captions = (figures / "captions.md").read_text()
    drawn = [draw(load_run(folder)) for draw in PLOTS.values()]
    assert all(f"**{one.name}.**" in captions and one.caption in captions for one in drawn)
    assert '"policy"' in captions


def test_a_run_without_anything_has_figures(tmp_path: Path) -> None:
    empty = load_run(write_files(tmp_path, [], [], [], []))
    figures = [draw(empty) for draw in PLOTS.values()]
    assert [figure.name for figure in figures] == list(PLOTS)
    assert all(images(figure, ["png"])["png"] for figure in figures)


def test_the_most_that_waited_is_drawn(tmp_path: Path) -> None:
    samples = [sample(i + 1.0, {}, waiting=99 if i == 501 else 1) for i in range(1000)]
    samples.append(sample(1000.01, {}, running=0, waiting=0))
    run = load_run(write_files(tmp_path, samples=samples))
    table = thin(run.frames.samples)
    assert table.height == 250 and table["most_waiting"].max() == 99.0 > max(table["waiting"])
    assert table["time"][-1] == 1000.01 and table["running"][-1] > 0.9, "no drop for the last hundredth"
