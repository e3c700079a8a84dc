"""The command line: `main` runs one command and returns its exit code.

0 done, 1 the run failed, 2 bad recipe or usage, 3 a requested check did not hold, 130 interrupted. A user's mistake is
one message on stderr; `--debug` adds the traceback.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from .out import ReaderGone

INTERRUPTED = 130
INTERNAL = "internal error"
PLUGIN_SECONDS = 120.0
"""How long a plugin named by a recipe may take to import, unless ULTRAZOO_PLUGIN_SECONDS says otherwise."""
_interrupted = threading.Event()
"""Was this run told to stop, whether or not anybody heard it?"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (`sys.argv` unless given) and return the exit code; raises nothing."""
    _interrupted.clear()
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments[: arguments.index("--")] if "--" in arguments else "--debug" in arguments
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except (BrokenPipeError, ReaderGone):
        # the reader has seen enough (`ultrazoo list | head -1`): not a failure, and nothing to say
        _silence()
        return 0
    except KeyboardInterrupt:
        return _say("interrupted", INTERRUPTED, debug)
    except SystemExit as stop:
        # shell completion and the parser leave this way
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except Exception as error:  # the last resort: whatever it is, the user gets a sentence and a code
        message, code = _explain(error, debug)
        if _interrupted.is_set() and message.startswith(INTERNAL):
            # a library caught the interrupt, and fell over what it had left half done
            message, code = "interrupted", INTERRUPTED
        return _say(message, code, debug)


def _run(arguments: list[str]) -> int:
    from .app import hoisted, program

    rest, settings = hoisted(arguments)
    with _terminable():
        result = program(settings).main(args=rest, prog_name="ultrazoo", standalone_mode=False)
    if result == INTERRUPTED:
        raise KeyboardInterrupt
    return result if isinstance(result, int) else 0


@contextmanager
def _terminable() -> Iterator[None]:
    """Treat SIGTERM, with which schedulers end a job, as Ctrl-C: what is half done is tidied up. Either is remembered."""

    def stop(*_: object) -> None:
        _interrupted.set()
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, stop)}
    # not where Ctrl-C is ignored, or is another program's affair
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _explain(error: Exception, debug: bool) -> tuple[str, int]:
    """What to tell the user about `error`, and the exit code."""
    from ..errors import ProblemsError, UltrazooError

    if isinstance(error, ProblemsError):
        return str(error), error.exit_code
    if isinstance(error, UltrazooError):
        return f"error: {error}", error.exit_code
    # the parser's own errors; the package that defines them differs between versions of typer
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):
        from .app import usage

        return usage(error), int(error.exit_code)
    if type(error).__name__ == "Abort":
        return "interrupted", INTERRUPTED
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"error: out of memory{f': {error}' if str(error) else ''}", 1
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"error: {where}{error.strerror}", 1
    hint = "" if debug else "; run again with --debug for the traceback"
    return f"{INTERNAL}: {type(error).__name__}: {error}{_blamed(error)}{hint}", 1


def _blamed(error: Exception) -> str:
    """Where in a plugin an error came up, or which plugins were there where it did."""
    import traceback

    from .. import registry

    try:
        parts = registry.foreign()
    except Exception:  # the sentence about the error itself must come through
        return ""
    packages = {module.partition(".")[0]: label for module, label in parts.items()}
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        module = str(frame.f_globals.get("__name__", ""))
        label = parts.get(module) or packages.get(module.partition(".")[0])
        if label:
            return f"; in line {line} of {frame.f_code.co_filename}, {label}"
    return f"; loaded from plugins: {', '.join(sorted(parts.values()))}" if parts else ""


def _say(message: str, code: int, debug: bool) -> int:
    """Print `message` on stderr, after the traceback when asked for, and hand back `code`."""
    if code == INTERRUPTED:
        # an interpreter that an interrupt met inside source given to exec, as code generators do, remembers it and ends by the
        # signal, with -2 and not 130, although it was caught here; any other source makes it forget
        eval("None")  # noqa: S307 - a constant
    try:
        if debug and code != INTERRUPTED:
            import traceback

            traceback.print_exc()
        from .out import style

        head, colon, tail = message.partition(":")
        if colon and head in ("error", INTERNAL):
            message = style(head + colon, "bold", "red", stream=sys.stderr) + tail
        print(message, file=sys.stderr, flush=True)
    except BrokenPipeError:
        _silence()
    return code


def _silence() -> None:
    """Point stdout at nothing, so that the interpreter's last flush does not complain."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        # no real file behind stdout (a test's buffer): nothing will be flushed into a pipe
        pass
