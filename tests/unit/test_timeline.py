"""The timeline: merged spans, the idle share, the picture."""

import pytest

from spin_ray.records import Span
from spin_ray.timeline import Timeline, idle_share, iteration_windows, merged, read_spans

MAIN, OPPONENT = "main player", "opponent 0"


def test_overlapping_and_touching_spans_become_one():
    spans = [Span(OPPONENT, "play", 0, 0, 2), Span(OPPONENT, "play", 0, 1, 3), Span(OPPONENT, "play", 0, 3.01, 4), Span(OPPONENT, "play", 0, 5, 6)]
    assert [(span.begin, span.end) for span in merged(spans)] == [(0, 4), (5, 6)]
    assert len(merged([Span(OPPONENT, "play", 0, 0, 2), Span(OPPONENT, "load", 0, 1, 3), Span(MAIN, "play", 0, 1, 3)])) == 3


def test_idle_share_counts_from_the_last_training_s_end(tmp_path):
    timeline = Timeline(tmp_path)
    timeline.add([Span(MAIN, "train", 0, 2, 10), Span(OPPONENT, "play", 0, 0, 9)])
    assert timeline.idle_share(0) == pytest.approx(0.2)  # play began at 0
    timeline.add([Span(MAIN, "save", 0, 10, 11), Span(MAIN, "train", 1, 12, 15), Span(MAIN, "train", 1, 16, 20)])
    assert timeline.idle_share(1) == pytest.approx(0.2)  # 11-12 and 15-16 of 10-20


def test_overlapping_spans_are_busy_once():
    spans = [Span(OPPONENT, "play", 0, 0, 4), Span(OPPONENT, "evaluate", 0, 1, 6), Span(OPPONENT, "play", 1, 9, 12)]
    assert idle_share(spans, OPPONENT, 0, 10) == pytest.approx(0.3)


def test_windows_of_a_resumed_run_begin_with_its_first_play():
    spans = [Span(OPPONENT, "play", 1, 5, 7), Span(MAIN, "train", 1, 6, 9), Span(MAIN, "train", 2, 11, 15)]
    assert iteration_windows(spans) == {1: (5, 9), 2: (9, 15)}


def test_picture_of_a_resumed_run(tmp_path):
    assert Timeline(tmp_path).draw() is None
    Timeline(tmp_path).add([Span(MAIN, "train", 0, 0, 10), Span(OPPONENT, "play", 0, 0, 4)])
    resumed = Timeline(tmp_path)
    resumed.add([Span(MAIN, "train", 1, 1000, 1010)])
    picture = resumed.draw()
    assert picture.read_bytes()[:4] == b"\x89PNG" and len(read_spans(tmp_path)) == 3
