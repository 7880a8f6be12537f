"""What the time of updates went into."""

from __future__ import annotations

import math

import pytest

from pipeline.sums import Window


def test_shares_are_of_the_windows_time_and_add_up_to_it():
    window = Window()
    for _ in range(4):
        window.add(32, waited=0.1)
    window.seconds, window.communicated = 2.0, 1.0
    assert window.shares() == pytest.approx((0.3, 0.5, 0.2))
    assert window.shares()._fields == ("compute", "communication", "data_wait")
    assert (window.rate(), window.steps) == (64, 4)


def test_nothing_is_divided_by_no_time():
    assert Window().rate() == 0 and Window().shares() == (0, 0, 0)


def test_what_was_not_measured_hides_nothing_else():
    window = Window()
    window.add(32, waited=0.5)
    window.seconds, window.communicated = 2.0, math.nan
    compute, communication, waiting = window.shares()
    assert math.isnan(compute) and math.isnan(communication) and waiting == 0.25
