"""Files that get their names together, or not at all."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from dit_accel.errors import EnvironmentProblem


class Stage:
    """Holds files under temporary names beside their own until all of them are written.

    ```python
    with Stage() as stage:
        stage.write_text(Path("a.json"), "{}")
        picture.save(stage.add(Path("b.png")))
    ```

    If the block ends well, all get their names, in the order in which they were added; an interrupt (Ctrl-C) waits
    until they have. If it does not, they are removed, and with them folders made for them; what had those names before
    stays.

    Raises:
        EnvironmentProblem: a file cannot be written.
    """

    def __init__(self) -> None:
        self._names: dict[Path, Path] = {}  # temporary -> its own
        self._folders: list[Path] = []  # made here, outer ones first

    def add(self, path: Path) -> Path:
        """The temporary name under which to write a file. Its folder is made."""
        part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
        missing = [folder for folder in path.parents if not folder.exists()]
        self._folders += reversed(missing)  # noted first, so that an interrupt leaves none
        with _explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._names[part] = path
        return part

    def write_text(self, path: Path, text: str) -> None:
        """Write a small text file."""
        self.add(path).write_text(text, encoding="utf-8")

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        with interrupts_held():
            try:
                if isinstance(error, OSError):
                    with _explained(self._meant(error)):
                        raise error
                if error is None:
                    for part, path in self._names.items():
                        with _explained(path):
                            os.replace(part, path)
            finally:
                for part in self._names:
                    part.unlink(missing_ok=True)
                for folder in reversed(self._folders):
                    with contextlib.suppress(OSError):  # it holds something by now, as it should
                        folder.rmdir()


    def _meant(self, error: OSError) -> Path:
        """The file that could not be written: the one the error names, else the last that was begun."""
        named = self._names.get(Path(error.filename)) if isinstance(error.filename, (str, Path)) else None
        return named or next(reversed(self._names.values()), Path())


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Let an interrupt (Ctrl-C) wait until the block is over. It never strikes another thread than the main one."""
    ours = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT) if ours else None
    if before is None:  # another thread, or a handler that Python cannot put back
        yield
        return
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EnvironmentProblem(f"cannot write {path}: {error.strerror or error}") from error
