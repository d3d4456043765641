"""Figures are pictures of one width, the same bytes for the same files, whatever the files hold."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from lab_files import write_files
from matplotlib.backends.backend_agg import FigureCanvasAgg

from aioengine.lab.figures import PLOTS, draw_run, load_run
from aioengine.lab.records import SlotSpan
from aioengine.lab.style import (
    DARK,
    DPI,
    LIGHT,
    WIDTH,
    drawing,
    new_figure,
    policy_label,
    seconds_text,
    share_text,
    shorten,
)


def test_all_figures_twice_the_same(tmp_path: Path) -> None:
    run = load_run(write_files(tmp_path))
    first, again = list(draw_run(run)), list(draw_run(run))
    assert [figure.name for figure in first] == [plot.name for plot in PLOTS]
    assert first == again
    for figure in first:
        assert figure.png.startswith(b"\x89PNG") and figure.title and figure.caption
        (width,) = struct.unpack(">I", figure.png[16:20])
        assert width == round(WIDTH * DPI)
        for word in (b"tEXt", b"tIME"):  # no program, no date
            assert word not in figure.png
    assert all(a.png != b.png for a, b in zip(first, draw_run(run, DARK), strict=True))


def test_a_run_without_anything(tmp_path: Path) -> None:
    run = load_run(write_files(tmp_path, [], [], [], []))
    assert len(list(draw_run(run))) == len(PLOTS)


def test_a_timeline_of_many_stays_shows_a_part(tmp_path: Path) -> None:
    spans = [SlotSpan(i % 2, f"adapter-{i % 30}", i * 1.0, i + 0.1, i + 1.0, 1) for i in range(600)]
    figures = {figure.name: figure for figure in draw_run(load_run(write_files(tmp_path, spans=spans)))}
    assert "600 stays in all" in figures["timeline"].title


@pytest.mark.parametrize("word", ["ill", "mow", "WWW"])
def test_titles_are_broken_before_they_leave_the_figure(word: str) -> None:
    with drawing(LIGHT):
        figure, _ = new_figure(" ".join([word] * 60), height=3)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        (title,) = figure.texts
        box = title.get_window_extent(canvas.get_renderer())
    assert box.width <= WIDTH * DPI and box.x0 >= 0 and box.x1 <= WIDTH * DPI
    assert box.width > 0.85 * WIDTH * DPI, "nor long before"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "–"),
        (0.0, "0 ms"),
        (0.0042, "4.2 ms"),
        (0.042, "42 ms"),
        (0.0999, "0.10 s"),
        (0.42, "0.42 s"),
        (0.999, "1.0 s"),
        (4.2, "4.2 s"),
        (9.99, "10 s"),
        (4200.0, "4,200 s"),
    ],
)
def test_seconds(seconds: float | None, text: str) -> None:
    assert seconds_text(seconds) == text


def test_shares_and_names() -> None:
    assert policy_label("vllm+lru") == "vllm+lru"
    assert policy_label("some/where/my_policy.py:Shortest") == "my_policy.py:Shortest"
    assert [share_text(share) for share in (None, 0.0, 0.004, 0.42, 0.996, 1.0)] == [
        "–",
        "0%",
        "0.4%",
        "42%",
        "99.6%",
        "100%",
    ]
    assert shorten("adapter-012") == "adapter-012"
    short = shorten("a-very-long-name-of-an-adapter-012")
    assert len(short) == 18 and short.endswith("-012")
    assert shorten("a\nb") == "a?b"
