from __future__ import annotations

import threading

import pytest

from verl_fl_overlay import events
from verl_fl_overlay.phase import Phase


@pytest.fixture
def phase():
    made = Phase("test")
    made.log = []
    made.entered.subscribe(lambda: made.log.append("in"))
    made.left.subscribe(lambda: made.log.append("out"))
    return made


@pytest.fixture(autouse=True)
def forget_failures():
    yield
    events.failures.begin(strict=False)


def test_only_the_outermost_moments_are_told(phase):
    with phase.inside("train"), phase.inside("train_batch"):
        assert (phase.depth, phase.active, phase.log) == (2, True, ["in"])
    assert (phase.depth, phase.active, phase.log) == (0, False, ["in", "out"])
    assert phase.counts == {"train": 1, "train_batch": 1}


def test_a_raising_step_leaves_the_phase(phase):
    with pytest.raises(KeyboardInterrupt), phase.inside("train"):
        raise KeyboardInterrupt
    assert (phase.active, phase.log) == (False, ["in", "out"])


def test_what_was_raised_is_told_before_the_phase_is_left(phase):
    phase.failed.subscribe(lambda error: phase.log.append(repr(error)))
    with pytest.raises(ValueError, match="lost"), phase.inside("train"), phase.inside("train_batch"):
        raise ValueError("lost")
    assert phase.log == ["in", "ValueError('lost')", "ValueError('lost')", "out"]


def test_leaving_what_is_off_does_nothing(phase):
    phase.leave()
    assert (phase.depth, phase.log) == (0, [])


def test_failing_subscriber_is_logged_once_and_skipped(phase, caplog):
    def fails():
        raise ValueError("broken feature")

    phase.entered.subscribe(fails)
    for _ in range(2):
        with phase.inside("train"):
            pass
    assert [r.message for r in caplog.records if "fails" in r.message].__len__() == 1
    assert list(events.failures.told().values()) == ["ValueError: broken feature"]
    assert phase.log == ["in", "out"] * 2


def test_strict_raises_and_still_leaves(phase):
    events.failures.begin(strict=True)

    def fails():
        raise ValueError("broken feature")

    phase.entered.subscribe(fails)
    with pytest.raises(ValueError, match="broken feature"), phase.inside("train"):
        pytest.fail("the body must not run")
    assert not phase.active


def test_unsubscribed_is_not_called(phase):
    take_back = phase.entered.subscribe(lambda: phase.log.append("mine"))
    take_back()
    with phase.inside("train"):
        pass
    assert phase.log == ["in", "out"]


def test_threads_share_one_phase(phase):
    def work():
        for _ in range(200):
            with phase.inside("train"):
                assert phase.active

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert phase.depth == 0
    assert phase.log[::2] == ["in"] * (len(phase.log) // 2), "entering and leaving alternate"


def test_two_features_cannot_answer_one_question():
    question = events.Question()
    assert question.ask() is None
    end = question.answer(lambda: "mine")
    with pytest.raises(RuntimeError, match="two features answer one question"):
        question.answer(lambda: "yours")
    assert question.ask() == "mine"
    end()
    end()
    assert question.ask() is None
