"""The page of a run: whole in one file, escaped, and the same for the same files."""

from __future__ import annotations

import base64
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.lab_files import write_files

from aioengine.errors import ConfigError
from aioengine.lab.analysis.summary import summarize
from aioengine.lab.report import run_page
from aioengine.lab.report.run_figures import PLOTS
from aioengine.lab.report.run_page import write_report
from aioengine.lab.report.style import Drawn
from aioengine.lab.report.timeline_page import in_script
from aioengine.lab.runs.rows import load_frames


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with its report, which takes seconds to draw."""
    folder = write_files(tmp_path_factory.mktemp("report") / "run")
    (folder / "summary.json").write_text(json.dumps(summarize(folder)))
    drawn: list[None] = []
    write_report(folder, lambda: drawn.append(None))
    assert len(drawn) == len(PLOTS)
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


@pytest.mark.slow
def test_the_page_is_whole_and_escaped(written: Path) -> None:
    text = (written / "report.html").read_text()
    links = Links()
    links.feed(text)
    assert "script" not in links.tags and "b" in links.tags  # the tiles' own, and not the policy's
    assert "&lt;script&gt;" in text and "&lt;b&gt;fcfs" in text and "<b>fcfs" not in text
    assert links.sources[-1] == "timeline.html"
    pictures = links.sources[:-1]
    assert len(pictures) == 2 * len(PLOTS)
    assert all(source.startswith("data:image/png;base64,") for source in pictures)
    for plot, source in zip(PLOTS, pictures[1::2], strict=True):  # the second of each is the light one
        png = (written / "figures" / f"{plot.name}.png").read_bytes()
        assert base64.b64decode(source.partition(",")[2]) == png
    assert "aioengine lab run --experiment FOLDER/experiment.json" in text
    assert str(written) not in text and not re.search(r"\b20\d\d-\d\d-\d\d\b", text)


def test_the_timeline_has_every_stay_and_fetches_nothing(written: Path) -> None:
    text = (written / "timeline.html").read_text()
    links = Links()
    links.feed(text)
    assert links.sources == []
    [data] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, flags=re.DOTALL)
    found = json.loads(data)
    stays = [
        (slot, found["adapters"][adapter], start, end, steps)
        for slot, row in enumerate(found["slots"])
        for adapter, start, _, end, steps in row
    ]
    spans = load_frames(written).slots.sort("slot", "start")
    assert stays == spans.select("slot", "adapter", "start", "end", "busy_steps").rows()
    for row in found["slots"]:  # the page looks for stays by bisection
        assert [stay[3] for stay in row] == sorted(stay[3] for stay in row)


@given(st.recursive(st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
@pytest.mark.slow
def test_no_text_leaves_the_script_that_it_stands_in(data: object) -> None:
    text = in_script(data)
    assert not set("<>&") & set(text)
    assert json.loads(text) == data


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"cannot read .*summary\.json"):
        write_report(folder)
    (folder / "summary.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        write_report(folder)


@pytest.mark.slow
def test_figures_for_a_paper(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With them the page and its figures are the same bytes as without: all depends on the files alone."""
    before = {path: path.read_bytes() for path in (written / "report.html", *written.glob("figures/*.png"))}
    unwritten = shutil.ignore_patterns("report.html", "figures")
    folder = shutil.copytree(written, tmp_path / "run", ignore=unwritten)
    drawn: list[tuple[Drawn, Drawn]] = []
    draw_both = run_page.draw_both

    def kept(*arguments: Any) -> list[tuple[Drawn, Drawn]]:
        drawn.extend(draw_both(*arguments))
        return drawn

    monkeypatch.setattr(run_page, "draw_both", kept)
    write_report(folder, vector=True)
    assert {path: (folder / path.relative_to(written)).read_bytes() for path in before} == before
    figures = folder / "figures"
    assert {path.stem for path in figures.glob("*.pdf")} == {plot.name for plot in PLOTS}
    first = {path.name: path.read_bytes() for path in figures.iterdir()}
    pdf = first[f"{PLOTS[0].name}.pdf"]
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf, "the fonts are in it, as TrueType"
    assert b"<text" not in first[f"{PLOTS[0].name}.svg"], "letters are outlines"
    captions = first["captions.md"].decode()
    assert all(f"**{plot.name}.**" in captions and plot.caption in captions for plot in PLOTS)
    assert '"max_num_seqs"' in captions or '"policy"' in captions
    monkeypatch.setattr(run_page, "draw_both", lambda *_: drawn)  # these have been compared
    write_report(folder, vector=True)
    assert {path.name: path.read_bytes() for path in figures.iterdir()} == first
