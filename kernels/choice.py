"""Choosing between an operation's two implementations, plain torch ("reference") and Triton; one `Choice` for each."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from dit_accel.errors import KernelUnavailable, unknown_name

IMPLEMENTATIONS = ("reference", "triton")


@dataclass(frozen=True)
class Choice:
    """What the operations' own `choose` and `why_not` have in common."""

    op: str  # the function that users call; it stands in the messages
    package: str  # where its `triton` module is; that has `why_not(*arguments)`

    def choose(self, impl: str, fast: bool, *arguments: Any) -> str:
        """The implementation that will run.

        Args:
            impl: a name, which runs or raises, or "auto".
            fast: whether "auto" is "triton".

        Raises:
            UnknownNameError: no such implementation.
            KernelUnavailable: it cannot run this call.
        """
        if impl == "auto":
            impl = "triton" if fast else "reference"
        reason = self.why_not(impl, *arguments)
        if reason is not None:
            raise KernelUnavailable(f"{self.op} impl={impl!r} cannot run this call: {reason}")
        return impl

    def why_not(self, impl: str, *arguments: Any) -> str | None:
        """Why `impl` cannot run this call, or None if it can."""
        if impl not in IMPLEMENTATIONS:
            raise unknown_name(f"{self.op} implementation", impl, (*IMPLEMENTATIONS, "auto"))
        if impl == "reference":
            return None
        try:
            implementation = importlib.import_module(".triton", self.package)
        except ImportError as error:
            return f"triton cannot be imported ({error}); install it with `pip install triton`."
        return implementation.why_not(*arguments)
