"""Figures are pictures of one width, the same bytes for the same files, whatever the files hold."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from support.lab_files import request, sample, write_files

from aioengine.lab.report.run_figures import PLOTS, draw_fairness, draw_run, load_run, thin
from aioengine.lab.report.style import (
    DARK,
    DPI,
    LIGHT,
    WIDTH,
    change_text,
    drawing,
    in_rows,
    new_figure,
    policy_label,
    seconds_text,
    share_text,
    shorten,
    text_on,
)
from aioengine.lab.runs.rows import SlotSpan


@pytest.mark.slow
def test_all_figures_twice_the_same(tmp_path: Path) -> None:
    run = load_run(write_files(tmp_path))
    first, again = list(draw_run(run)), list(draw_run(run))
    assert [figure.name for figure in first] == [plot.name for plot in PLOTS]
    assert [figure[:4] for figure in first] == [figure[:4] for figure in again]
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


@pytest.mark.slow
def test_a_timeline_of_many_stays_shows_a_part(tmp_path: Path) -> None:
    spans = [SlotSpan(i % 2, f"adapter-{i % 30}", i * 1.0, i + 0.1, i + 1.0, 1) for i in range(600)]
    figures = {figure.name: figure for figure in draw_run(load_run(write_files(tmp_path, spans=spans)))}
    assert "600 stays in all" in figures["timeline"].title


def test_service_has_a_panel_where_it_differed(tmp_path: Path) -> None:
    requests = [
        request(f"{name}{i}", name, i * 1.0, admitted=90.0, ended=100.0) for i in (0, 1) for name in "ab"
    ]
    shown = {}
    for name, service in (("apart", {"a": 90, "b": 10}), ("even", {"a": 50, "b": 50})):
        samples = [sample(time, service if time == 4.0 else {}) for time in (2.0, 4.0, 6.0)]
        run = load_run(write_files(tmp_path / name, requests, samples=samples))
        with drawing(LIGHT):
            shown[name] = draw_fairness(run, LIGHT)
    assert len(shown["apart"].axes) == 2 and "differ by 80 tokens" in shown["apart"].get_suptitle()
    assert len(shown["even"].axes) == 1 and "VTC" in shown["even"].get_supxlabel()


def test_the_most_that_waited_is_drawn(tmp_path: Path) -> None:
    samples = [sample(i + 1.0, {}, waiting=99 if i == 501 else 1) for i in range(1000)]
    samples.append(sample(1000.01, {}, running=0, waiting=0))
    run = load_run(write_files(tmp_path, samples=samples))
    table = thin(run.frames.samples)
    assert table.height == 166 and table["most_waiting"].max() == 99.0 > max(table["waiting"])
    assert table["time"][-1] == 1000.01 and table["running"][-1] > 0.9, "no drop for the last hundredth"


def test_legends_are_read_row_by_row() -> None:
    with drawing(LIGHT):
        _, (axes,) = new_figure("Title", height=3)
        for name in "abcde":
            axes.plot([0], [0], label=name)
        assert in_rows(axes, 3)[1] == ["a", "d", "b", "e", "c"]  # columns a d, b e, c


def test_text_stands_out_from_bars() -> None:
    assert text_on(LIGHT.palette[0], LIGHT) == LIGHT.background
    assert text_on(LIGHT.palette[5], LIGHT) == LIGHT.text
    assert text_on(DARK.palette[5], DARK) == DARK.background
    assert text_on(DARK.neutral, DARK) == DARK.text


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


@pytest.mark.slow
def test_no_word_of_a_title_is_left_alone_nor_a_unit() -> None:
    with drawing(LIGHT):
        for count in range(1, 60):
            figure, _ = new_figure("word " * count + "12 s", height=3)
            lines = figure.get_suptitle().split("\n")
            assert lines[-1].endswith("12\N{NO-BREAK SPACE}s")
            assert len(lines) == 1 or " " in lines[-1]


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
    assert [change_text(x) for x in (0.1, -0.1, 0.996, 0.004, -0.0002, 0)] == [
        "+10%",
        "−10%",
        "+99.6%",
        "+0.4%",
        "±0%",
        "±0%",
    ]
    assert shorten("adapter-012") == "adapter-012"
    short = shorten("a-very-long-name-of-an-adapter-012")
    assert len(short) == 18 and short.endswith("-012")
    assert shorten("a\nb") == "a?b"
