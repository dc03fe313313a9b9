"""The command tree, and the one place where an error becomes a line on stderr and an exit code."""

from __future__ import annotations

import difflib
import sys
import traceback
from collections.abc import Sequence

import typer

import dit_accel
from dit_accel.cli import bench, comfy, compare, doctor, estimate, generate, inspect, presets, tune
from dit_accel.cli.terminal import complain
from dit_accel.errors import DitAccelError

EXIT_CODES = (
    "Exit codes: 0 done; 1 the run failed; 2 a wrong option, preset or size; 3 something missing here "
    "(weights, dependency, GPU); 4 --strict forbade a dense fall-back; 130 interrupted."
)

app = typer.Typer(
    name="dit-accel",
    help="Make diffusers video and image transformers faster, and say truthfully what that cost.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("generate", epilog=EXIT_CODES)(generate.generate)
app.command("inspect", epilog=EXIT_CODES)(inspect.inspect)
app.command("estimate", epilog=EXIT_CODES)(estimate.estimate)
app.command("compare", epilog=EXIT_CODES)(compare.compare)
app.command("bench", epilog=EXIT_CODES)(bench.bench)
app.command("tune", epilog=EXIT_CODES)(tune.tune)
app.command("doctor", epilog="Exit codes: 0 sound; 1 something is broken.")(doctor.doctor)
app.add_typer(presets.app, name="presets")
app.add_typer(comfy.app, name="comfy")


def _version(asked: bool) -> None:
    if asked:
        print(f"dit-accel {dit_accel.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    pass


def run(arguments: Sequence[str]) -> int:
    """Run one command line.

    Returns:
        The exit code. What the user can mend is one line on stderr; a traceback comes only with -v.
    """
    verbose = any(word in ("-v", "--verbose") for word in arguments)
    try:
        outcome = typer.main.get_command(app)(
            args=list(arguments), prog_name="dit-accel", standalone_mode=False
        )
        sys.stdout.flush()
        if outcome == 130:  # some releases of typer turn Ctrl-C into this
            raise KeyboardInterrupt
        return outcome if isinstance(outcome, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        complain("interrupted; nothing half-written was left")
        return 130
    except DitAccelError as error:
        if verbose:
            traceback.print_exc()
        complain(str(error))
        return error.exit_code
    except BrokenPipeError:
        # Whoever read our output has gone; nothing can be said to them, and Python must not try at exit.
        sys.stdout = None
        return 1
    except Exception as error:
        if hasattr(
            error, "format_message"
        ):  # typer's own: wrong usage; some releases carry click, some a copy of it
            # Without a message it is "no arguments", for which the help has been shown already.
            if error.format_message():
                complain(f"{_misuse(error)} (see dit-accel {_verb(error)}--help)")
            return 2
        if verbose:
            traceback.print_exc()
        complain(f"{_kind(error)}: {error}" + ("" if verbose else " (-v shows the traceback)"))
        return 1


def _misuse(error: Exception) -> str:
    """typer's message, with the nearest option where one was unknown (for commands it says so itself)."""
    message = error.format_message()
    known = list(getattr(error, "possibilities", None) or ())
    near = difflib.get_close_matches(getattr(error, "option_name", ""), known, n=1, cutoff=0.5)
    return f"{message.split(' (')[0]}. Did you mean {near[0]}?" if near else message


def _verb(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    path = getattr(context, "command_path", "").split()[1:]
    return " ".join([*path, ""]) if path else ""


def _kind(error: Exception) -> str:
    if type(error).__name__ == "OutOfMemoryError":
        return "out of GPU memory; try --offload model, fewer frames or a smaller size"
    return f"the run failed, {type(error).__name__}"
