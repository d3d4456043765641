"""Launches that Triton's own way is left out of are those that it would have made."""

from __future__ import annotations

from functools import partial

from support.fake_gpu import run_on_fake_gpu

run = partial(run_on_fake_gpu, file="launches")


def test_launches_are_those_of_triton() -> None:
    """Of generated arguments: the same compiled kernel, and the same arguments, on the same stream."""
    wrong, usual, elsewhere = run("generated", "4000")
    assert wrong == []
    assert elsewhere < usual < 3000, "Triton's way is for what is new, or begins elsewhere"


def test_what_goes_the_usual_way() -> None:
    assert run("usual_ways") == {
        "first": [1, 0],
        "hook": [1, 1],
        "pre-run hook": [1, 1],
        "as before": [0, 0],
        "without later hooks": [0, 0],
        "another driver": [1, 0],
        "another maker": [1, 1],
        "another Triton": [1, 1],
    }


def test_a_launch_is_on_the_device_of_its_tensors() -> None:
    assert run("devices") == [[0, 0], [1, 0], [1, 0], [0, 0], [2, 0], [1, 0]]
