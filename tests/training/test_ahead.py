"""The next batch, made while the model is busy with this one."""

from __future__ import annotations

import threading

import pytest

from dit_accel.training.ahead import Ahead


def test_what_was_foreseen_is_made_beforehand_and_once() -> None:
    made, begun = [], threading.Event()

    def make(place: int) -> int:
        made.append((place, threading.current_thread() is threading.main_thread()))
        if place == 1:
            begun.set()
        return 10 * place

    ahead = Ahead(make)
    assert ahead.take(0, following=1) == 0
    assert begun.wait(10)  # without anyone asking for it
    assert ahead.take(1, following=2) == 10
    assert ahead.take(2) == 20
    assert made == [(0, False), (1, False), (2, False)]


def test_another_place_than_foreseen_is_made_all_the_same() -> None:
    ahead = Ahead(lambda place: 10 * place)
    ahead.take(0, following=1)
    assert ahead.take(5, following=6) == 50
    assert ahead.take(1) == 10


def test_an_error_is_raised_for_the_place_that_it_is_of() -> None:
    def make(place: int) -> int:
        if place == 1:
            raise OSError("no such sample")
        return place

    ahead = Ahead(make)
    assert ahead.take(0, following=1) == 0
    with pytest.raises(OSError, match="no such sample"):
        ahead.take(1)
    assert ahead.take(2, following=1) == 2
    ahead.close()  # what nobody wants has no error
    assert ahead.take(3) == 3


def test_closing_waits_for_what_is_being_made() -> None:
    begun, go, done = threading.Event(), threading.Event(), []

    def make(place: int) -> int:
        if place == 1:
            begun.set()
            go.wait(10)
            done.append(place)
        return place

    ahead = Ahead(make)
    ahead.take(0, following=1)
    assert begun.wait(10)
    threading.Timer(0.2, go.set).start()
    ahead.close()
    assert done == [1]  # nothing runs on behind it
    assert ahead.take(2) == 2
