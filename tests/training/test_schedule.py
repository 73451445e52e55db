"""The learning rate at the places that matter."""

from __future__ import annotations

import itertools

import pytest

from sisa_dist.config import ScheduleConfig
from sisa_dist.training.schedule import learning_rate


def test_warm_up_then_half_a_cosine() -> None:
    schedule = ScheduleConfig(kind="cosine", warmup_steps=10, final_lr_ratio=0.1)
    lr = [learning_rate(step, peak=1.0, steps=110, schedule=schedule) for step in range(111)]
    assert lr[0] == pytest.approx(0.1) and lr[9] == pytest.approx(1.0) and lr[10] == pytest.approx(1.0)
    assert lr[60] == pytest.approx(0.55) and lr[110] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(lr[10:]))


def test_wsd_holds_its_peak_then_falls_in_a_line() -> None:
    schedule = ScheduleConfig(kind="wsd", warmup_steps=4, decay_steps=20, final_lr_ratio=0.0)
    lr = [learning_rate(step, peak=2.0, steps=100, schedule=schedule) for step in range(101)]
    assert lr[3] == lr[50] == lr[80] == 2.0
    assert lr[90] == pytest.approx(1.0) and lr[100] == 0.0 and lr[99] > 0


def test_no_warm_up() -> None:
    schedule = ScheduleConfig(warmup_steps=0)
    assert learning_rate(0, peak=3.0, steps=1, schedule=schedule) == 3.0
