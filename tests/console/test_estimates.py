"""The time left, on a clock that the tests turn."""

import pytest

from torchthaw.console.estimates import TimeLeft


def run_stage(time_left, later, *, now, epochs, per_epoch, step, pause, first_step=0.0):
    """Plays a stage; returns the time at its end, and for each step what was estimated and what was true."""
    end = now + first_step + epochs * (per_epoch * step + pause)
    time_left.start_stage(later, steps=epochs * per_epoch, epochs=epochs, now=now)
    told = []
    for epoch in range(epochs):
        time_left.resume(now)
        for number in range(per_epoch):
            now += step + (first_step if epoch == number == 0 else 0)
            time_left.step(now)
            told.append((time_left.of_stage(now), end - now, time_left.of_run(now)))
        now += pause
    assert now == pytest.approx(end)
    return now, told


def test_each_stage_is_estimated_from_its_own_steps():
    time_left = TimeLeft()
    now, told = run_stage(time_left, ["all"], now=100, epochs=3, per_epoch=10, step=0.1, pause=2, first_step=30)
    assert [estimate for estimate, _, _ in told[:3]] == [None] * 3, "nothing is promised by the first steps"
    # Before the first validation its length is unknown; the slow first step never counts.
    for estimate, true, _ in told[10:]:
        assert estimate == pytest.approx(true, rel=1e-6)
    assert all(of_run is None for _, _, of_run in told), "the other stage's speed is not known"
    _, told = run_stage(time_left, [], now=now, epochs=2, per_epoch=10, step=1.5, pause=2)
    assert told[0][0] is None
    for estimate, true, of_run in told[3:]:
        assert estimate == pytest.approx(true, rel=1e-6), "the pause is taken from the stage before"
        assert of_run == estimate


def test_speed_follows_a_cache_that_fills():
    time_left = TimeLeft()
    time_left.start_stage([], steps=100, epochs=1, now=0)
    now = 0.0
    time_left.resume(now)
    for step in range(60):
        now += 5 if step < 20 else 0.5
        time_left.step(now)
    assert time_left.of_stage(now) == pytest.approx(20)


def test_the_estimate_runs_down_between_steps_but_not_below_nothing():
    time_left = TimeLeft()
    time_left.start_stage([], steps=10, epochs=1, now=0)
    for now in range(1, 6):
        time_left.step(now)
    assert time_left.of_stage(5) == 5
    assert time_left.of_stage(7) == 3
    assert time_left.of_stage(100) == 0


def test_stages_that_another_fold_has_timed_count():
    time_left = TimeLeft({"b": 40.0})
    time_left.start_stage(["b"], steps=10, epochs=1, now=0)
    for now in range(1, 6):
        time_left.step(now)
    assert time_left.of_run(5) == 45
