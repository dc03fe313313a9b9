"""Ahead: makes the next batch in a thread of its own while the model is busy with this one."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Place = TypeVar("Place", bound=Hashable)
Made = TypeVar("Made")


class Ahead(Generic[Place, Made]):
    """What `make` gives for a place, made beforehand where the place was foreseen.

    Args:
        make: of a place; a function of it alone, for it runs in another thread. What it raises is raised by `take`.
    """

    def __init__(self, make: Callable[[Place], Made]) -> None:
        self._make = make
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="next-batch")
        self._waiting: tuple[Place, Future[Made]] | None = None

    def take(self, place: Place, following: Place | None = None) -> Made:
        """What is made for a place; in the meantime that for the following one is begun, if there is one."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None and waiting[0] == place:
            made = waiting[1].result()
        else:
            self._drop(waiting)
            made = self._pool.submit(self._make, place).result()
        if following is not None:
            self._waiting = following, self._pool.submit(self._make, following)
        return made

    def close(self) -> None:
        """Wait for what is being made, and let go of it. `take` may be called again."""
        waiting, self._waiting = self._waiting, None
        self._drop(waiting)

    def _drop(self, waiting: tuple[Place, Future[Made]] | None) -> None:
        if waiting is not None and not waiting[1].cancel():
            waiting[1].exception()  # it is of no use any more, and so is its error
