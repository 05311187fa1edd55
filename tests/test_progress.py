"""Long waits: a bar in a terminal, elsewhere a line by the clock."""

import itertools
import re
import time

import pytest

from genai import progress
from genai.progress import Board, Task, duration, follow, task, track


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def board(monkeypatch):
    found = Board(Clock(), threaded=False)
    monkeypatch.setattr(progress, "board", found)
    return found


def seconds(board, n, each=lambda second: None):
    for second in range(n):
        board.clock.now += 1
        each(second)
        board.tick()


def test_a_wait_has_a_line_after_five_seconds_and_then_at_least_every_thirty(board, capsys):
    said = []

    def each(second):
        shown.add(2)
        said.extend((second, line) for line in capsys.readouterr().err.splitlines())

    with task("encoding train", 2000, "samples") as shown:
        seconds(board, 600, each)
    times = [second for second, _ in said]
    assert times[0] == 5 and max(b - a for a, b in itertools.pairwise(times)) <= 30
    assert said[0][1] == "encoding train 10/2000 samples  17 min left"
    assert said[-1][1].startswith("encoding train 11") and said[-1][1].endswith(" min left")


def test_a_quick_wait_is_silent(board, capsys):
    for _ in range(20):
        with task("saving"):
            seconds(board, 4)
    assert capsys.readouterr() == ("", "")


def test_a_wait_inside_another_is_said_after_it(board, capsys):
    outer = board.open(Task("step", 100), "stdout")
    outer.note = "2 steps/s"
    seconds(board, 20, lambda _: outer.add(2))
    capsys.readouterr()
    with task("sampling", unit="steps") as shown:
        on_step = follow(shown)
        seconds(board, 30, lambda second: on_step(second, 50, {}))
    board.close(outer)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "step 40/100  2 steps/s  38 s left; sampling 5/50 steps  45 s left"
    assert second.startswith("step 40/100") and "sampling 30/50 steps" in second
    assert not board.tasks


def test_what_blocks_without_a_count_is_said_with_the_time_so_far(board, capsys):
    with task("learning the tokenizer bpe, once"):
        seconds(board, 31)
    assert capsys.readouterr().err.splitlines() == [
        "learning the tokenizer bpe, once  5 s so far",
        "learning the tokenizer bpe, once  30 s so far",
    ]


def test_items_are_counted_once_they_are_used_and_an_error_ends_the_wait(board):
    found = []
    for item in track([3, 4], "reading", 7, "items", count=lambda item: item):
        found.append((item, board.tasks[0].done))
    assert found == [(3, 0), (4, 3)] and not board.tasks
    with pytest.raises(ValueError, match="torn"), task("reading"):
        raise ValueError("torn")
    assert not board.tasks


def test_ranks_above_the_first_are_silent(board, capsys):
    board.silent = True
    with task("reading"):
        seconds(board, 40)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_has_a_bar_for_each_wait(board, capsys, monkeypatch):
    import sys

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with task("training the classifier", 3000, "steps") as outer, task("saving"):
        board.tick()
        assert capsys.readouterr().err == ""  # not yet: it would flicker
        outer.to(1500, 3000)
        seconds(board, 2)
        shown = capsys.readouterr().err
    assert "training the classifier 1500/3000 steps" in shown and "2 s left" in shown and "saving" in shown
    assert "\n" in shown and board.bar is None and not board.rows


def test_a_thread_speaks_while_the_main_one_is_blocked(monkeypatch, capsys):
    monkeypatch.setattr(progress, "SOON", 0.5)
    with task("compiling"):
        time.sleep(2.5)
    assert re.fullmatch(r"compiling  [1-9] s so far\n", capsys.readouterr().err)


def test_durations():
    assert [duration(s) for s in (0.4, 99, 100, 5999, 12600)] == ["0 s", "99 s", "2 min", "100 min", "3.5 h"]
