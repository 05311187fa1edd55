"""Metrics of melodies, by tunes whose figures are known."""

import pytest

from genai.metrics import melody

SCALE = [(4 * i, 4 * i + 4, 60 + k) for i, k in enumerate((*melody.MAJOR, 12))]


def moved(notes, by, later=0):
    return [(start + later, end + later, pitch + by) for start, end, pitch in notes]


def test_a_scale_is_in_its_key_and_spans_an_octave():
    assert melody.pitch_range([SCALE]) == 12 and melody.out_of_key([moved(SCALE, 5)]) == pytest.approx(0)
    assert melody.pitch_range([SCALE, [(0, 4, 50)]]) == 6
    chromatic = [(i, i + 1, 60 + i) for i in range(12)]
    assert melody.out_of_key([chromatic]) == pytest.approx(5 / 12)
    assert melody.out_of_key([[*SCALE, (32, 64, 61)]]) == pytest.approx(12 / 64), "in D, which C and F are not of"


def test_repetition_is_the_share_of_patterns_that_came_before():
    assert melody.repetition([SCALE]) == 0
    twice = [*SCALE, *moved(SCALE, 0, 32)]  # 13 patterns of four, of which the last five came before
    assert melody.repetition([twice]) == pytest.approx(5 / 13)
    assert melody.repetition([[*SCALE, *moved(SCALE, 1, 32)]]) == 0
    assert melody.repetition([SCALE[:3]]) == 0


def test_copies_are_found_in_any_key_and_not_across_pieces():
    train = melody.join([SCALE[:5], SCALE[4:]])
    assert melody.copied_notes([SCALE], train) == 5
    assert melody.copied_notes([moved(SCALE[:5], 7, 3)], train) == 5
    assert melody.copied_notes([SCALE[4:], []], train) == 4
    slower = [(2 * a, 2 * b, p) for a, b, p in SCALE]
    assert melody.copied_notes([slower], train) == 1
    assert melody.copied_notes([[]], train) == melody.copied_notes([[(0, 4, 60)]], train) == 0


def test_melodies_without_notes_have_figures():
    assert melody.pitch_range([[]]) == melody.out_of_key([[]]) == melody.repetition([[]]) == 0
    assert len(melody.join([])) == 0 and len(melody.join([[]])) == 1
