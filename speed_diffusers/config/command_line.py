"""What every script here shares: help, one-line errors and exit codes."""

import errno
import io
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn, TextIO

from ..errors import InputError
from .schema import help_text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance, ReadableBuffer

# A launcher that sees rank 0 fail ends the other ranks within a fraction of this.
SECONDS_FOR_RANK_0 = 20.0

# A reader of a pipe that has ended (Windows says EINVAL), and a terminal that was closed.
READER_IS_GONE = (errno.EPIPE, errno.EINVAL, errno.EIO)


def run_script(
    main: Callable[[list[str]], None], doc: str | None = None, schema: "type[DataclassInstance] | None" = None
) -> NoReturn:
    """Runs a script's `main` on the command line and exits: 0 done, 1 failed, 2 wrong input, 130 interrupted.

    Wrong input is one line on stderr, `error: ...`, from one process only. Gradients that are not finite and errors of
    the operating system are one line too, with exit code 1; any other exception keeps its traceback. What the terminal
    cannot encode is escaped, and what nobody reads any more, as behind `| head`, is dropped: neither ends a script.

    Args:
        main: Takes the command line without the program's name; raises `InputError` for wrong input.
        doc: The script's docstring, shown by `--help`, `-h` and `help`.
        schema: The script's settings, listed by the same.
    """
    sys.stdout, sys.stderr = _unfailing(sys.stdout), _unfailing(sys.stderr)
    argv = sys.argv[1:]
    if argv == ["help"] or "--help" in argv or "-h" in argv:
        if _rank() == "0":
            print(help_text(schema, doc) if schema else (doc or "").strip())
        sys.exit(0)
    try:
        main(argv)
    except InputError as error:
        _wait_for_rank_0()
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
        sys.exit(2)
    except (FloatingPointError, OSError) as error:
        # A diverged run or a full disk: no fault of the code, so no traceback, but not of the command line either.
        print(f"error: {type(error).__name__}:", " ".join(str(error).splitlines()), file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        if _rank() == "0":
            print("error: interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


class _Output(io.FileIO):
    """A file descriptor that takes no harm from a reader who has left."""

    def write(self, data: "ReadableBuffer", /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in READER_IS_GONE:
                raise
            return memoryview(data).nbytes


def _unfailing(stream: TextIO) -> TextIO:
    """The stream itself where it is no plain file, pipe or terminal, as in a notebook; None stays None."""
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    stream.reconfigure(errors="backslashreplace")
    raw = getattr(stream.buffer, "raw", stream.buffer)
    if type(raw) is not io.FileIO:
        return stream
    output = _Output(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        # Without a buffer between where python -u has none either.
        output if raw is stream.buffer else io.BufferedWriter(output),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _rank() -> str:
    """The number of this process among those of a launcher; "0" for one that is alone, whatever its number."""
    if os.environ.get("WORLD_SIZE", "").strip() in ("", "1"):
        return os.environ.get("LOCAL_RANK") or "0"
    return os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0"


def _wait_for_rank_0() -> None:
    """Leaves the error to rank 0, which has mostly made the same; returns if it has not ended the run by then.

    The error was then this rank's own, or rank 0 is on another machine. Higher ranks of a machine wait longer, so that
    the launcher ends them once the first has reported.
    """
    if _rank() == "0":
        return
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the script's own handler would let this rank live and repeat it
    time.sleep(SECONDS_FOR_RANK_0 + int(os.environ.get("LOCAL_RANK") or 0))
