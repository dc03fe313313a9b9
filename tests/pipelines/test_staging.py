"""Files get their names together, or not at all."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dit_accel.errors import EnvironmentProblem
from dit_accel.pipelines.staging import Stage, interrupts_held


@pytest.fixture(autouse=True)
def _interrupts_raise() -> Iterator[None]:
    """As in a terminal: a test run in the background ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_no_file_has_its_name_before_all_are_written(tmp_path: Path) -> None:
    with Stage() as stage:
        stage.write_text(tmp_path / "a.txt", "a")
        stage.add(tmp_path / "b.json").write_text("b")
        assert not {"a.txt", "b.json"} & set(contents(tmp_path))
    assert contents(tmp_path) == {"a.txt": "a", "b.json": "b"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_block_that_breaks_off_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "a.txt").write_text("before")
    with pytest.raises(error), Stage() as stage:
        stage.write_text(tmp_path / "a.txt", "a")
        stage.write_text(tmp_path / "b.txt", "b")
        raise error
    assert contents(tmp_path) == {"a.txt": "before"}


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentProblem, match=r"cannot write .*a\.txt"), Stage() as stage:
        stage.write_text(tmp_path / "file" / "a.txt", "a")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(EnvironmentProblem, match=r"cannot write .*folder\.txt"), Stage() as stage:
        stage.write_text(tmp_path / "folder.txt", "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.txt"]


def test_the_file_at_fault_is_named_among_several(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=r"cannot write .*b\.txt: No space"), Stage() as stage:
        stage.write_text(tmp_path / "a.txt", "new")
        stage.add(tmp_path / "b.txt")
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(EnvironmentProblem, match=r"cannot write .*a\.txt: No such"), Stage() as stage:
        stage.add(tmp_path / "a.txt").open()
        stage.add(tmp_path / "b.txt")
    with pytest.raises(EnvironmentProblem, match=r"cannot write .*a\.txt: No such"), Stage() as stage:
        stage.add(tmp_path / "a.txt")  # never written, so that it cannot be given its name
        stage.write_text(tmp_path / "b.txt", "new")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_waits_for_the_end_of_the_block() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts_held():
        os.kill(os.getpid(), signal.SIGINT)
        done.append("the rest")
    assert done and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_threads_may_write_too(tmp_path: Path) -> None:
    def write() -> None:
        with Stage() as stage:
            stage.write_text(tmp_path / "a.txt", "a")

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    assert contents(tmp_path) == {"a.txt": "a"}
