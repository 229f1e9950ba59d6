"""Runs a command: its words parsed, its errors told in one line, its output never waited for.

Exit status 0: done; 1: it could not be done, and one line on stderr says why and what to do; 2:
wrong usage.
"""

from __future__ import annotations

import contextlib
import os
import sys
from argparse import Action, ArgumentError, ArgumentParser, HelpFormatter, Namespace
from itertools import dropwhile

from ..errors import IvshmemError
from ..text import plain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import Any, NoReturn


class Help(HelpFormatter):
    """As wide as the terminal; argparse itself imports shutil for that, with each option."""

    def __init__(self, prog: str, **how: Any) -> None:
        super().__init__(prog, **{"width": _columns() - 2, **how})


def _columns() -> int:
    columns = 0
    with contextlib.suppress(KeyError, ValueError):
        columns = int(os.environ["COLUMNS"])
    if columns <= 0:
        with contextlib.suppress(OSError):
            columns = os.get_terminal_size(1).columns
    return max(columns, 20) if columns > 0 else 80


class Parser(ArgumentParser):
    """Says what is wrong in one line, not after a screen of usage; and what was meant, perhaps."""

    def __init__(self, *arguments: Any, **how: Any) -> None:
        super().__init__(*arguments, **{"formatter_class": Help, **how})

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {plain(message)} (see {self.prog} --help)\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        # argparse drops each error, so that help on a full disk would look as if it was written.
        # A closed pipe is not an error: its reader has seen enough.
        with contextlib.suppress(BrokenPipeError):
            if file is sys.stdout:
                file.write(message)
                file.flush()
                return
        super()._print_message(message, file)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        # Where a subcommand goes, no word at all and the word `help` ask what there is.
        if self._subparsers is not None and (not args or args[0] == "help"):
            args = [*dropwhile("help".__eq__, args or ()), "--help"]
        # Each parser refuses what it does not know: the outermost one would name the wrong help.
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            option = unknown[0].partition("=")[0]
            meant = suggestion(option, self._option_string_actions) if option[:1] == "-" else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
        return found, unknown

    def _check_value(self, action: Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            allowed = [str(choice) for choice in action.choices]
            meant = suggestion(str(value), allowed) or f": allowed are {', '.join(allowed)}"
            raise ArgumentError(action, f"invalid choice: {value!r}{meant}")


def suggestion(word: str, known: Iterable[str]) -> str:
    """ ": did you mean X?", if one of the known words is like this one."""
    import difflib  # here, since it is seldom needed

    lower = {each.lower(): each for each in known}
    like = difflib.get_close_matches(word.lower(), list(lower), 1)
    return f": did you mean {lower[like[0]]}?" if like else ""


def parsed(parser: Parser, arguments: Sequence[str] | None) -> Namespace:
    """Parse the arguments; errors and help exit, also if their output cannot be written."""
    try:
        open_standard_streams()
    except OSError as error:  # too many open files
        raise SystemExit(fail(error)) from None
    try:
        try:
            return parser.parse_args(arguments)
        except SystemExit:
            _drop_output()
            raise
    except KeyboardInterrupt:  # perhaps while the help waited for its reader
        _lose_output()
        raise SystemExit(130) from None


def open_standard_streams() -> None:
    """Give descriptors 0, 1 and 2 to /dev/null where they are closed, before a file gets them."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    # A character that the terminal's encoding lacks must not end the output within a table.
    with contextlib.suppress(AttributeError):  # another object stands for it, in a test for one
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def guarded(run: Callable[..., int | None], *arguments: object) -> int:
    """Call `run` and turn what users can cause into one line and an exit status."""
    try:
        return _guarded(run, *arguments)
    except KeyboardInterrupt:  # while an error waited for its reader
        _lose_output()
        return 130
    except Exception as error:
        return ran_short(error)


def ran_short(error: Exception) -> int:
    """Print one line if the error means that memory or descriptors ran short, else raise it.

    Imports meet such a shortage too, since a command imports what it needs while it runs.
    """
    if not isinstance(error, OSError) and not (lack := _lack(error)):
        raise error
    status = fail(error) if isinstance(error, OSError) else _complain(lack)
    _drop_output()
    return status


def _lack(error: Exception) -> str:
    """What was short, and what to do, where the error is not an OSError; "": nothing was."""
    text = str(error)
    if isinstance(error, RuntimeError):  # Python drops the errno of pthread_create(3)
        return _NO_THREAD if text.startswith("can't start new thread") else ""
    if isinstance(error, ImportError) and "Too many open files" in text:  # of dlopen(3)
        return f"too many open files{_HINTS[24]}"
    unmapped = isinstance(error, ImportError) and ("map segment" in text or "allocate" in text)
    # Some of Python's own code tells of no memory by an error without an exception. Without a limit
    # it is a fault in code in C, and not to be hidden: Linux gives memory until it kills.
    lost = isinstance(error, SystemError) and "without" in text and "exception" in text
    lost = lost and _memory_is_limited()
    return _NO_MEMORY if unmapped or lost or isinstance(error, MemoryError) else ""


def _memory_is_limited() -> bool:
    """Whether this process has a limit of its own on memory; True if it cannot even ask."""
    try:
        import resource  # rarely needed
    except (ImportError, MemoryError, SystemError):
        return True
    limits = (resource.RLIMIT_AS, resource.RLIMIT_DATA)
    return any(resource.getrlimit(limit)[0] != resource.RLIM_INFINITY for limit in limits)


_errors_as_json = False

_REMEDY = "raise the limit with `ulimit -v unlimited`, or for a service with LimitAS=infinity"
_NO_MEMORY = f"out of memory for this process: {_REMEDY}"
_NO_THREAD = f"cannot start a thread, out of memory or processes: {_REMEDY}; or raise `ulimit -u`"


def _guarded(run: Callable[..., int | None], *arguments: object) -> int:
    try:
        status = run(*arguments)
        sys.stdout.flush()
    except BrokenPipeError as error:
        # The reader of our output has seen enough; or a process that was asked something is gone.
        status = 1 if error.filename is None and _is_unread() else fail(error)
    except KeyboardInterrupt:
        status = 130
        _lose_output()
    except SystemExit:  # by a signal
        _lose_output()
        raise
    except (IvshmemError, OSError, ValueError, OverflowError) as error:
        status = fail(error)
    _drop_output()
    return int(status or 0)


def _is_unread() -> bool:
    """Whether standard output has no reader any more."""
    import select  # rarely needed

    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):
        return True  # it is closed
    return bool(poll.poll(0))


def _drop_output() -> None:
    """Lose what cannot be written: at its exit Python would try it again, and complain."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            _lose(stream)


def _lose_output() -> None:
    """Lose what was not written yet, so that the exit waits for no reader."""
    for stream in (sys.stdout, sys.stderr):
        _lose(stream)


def _lose(stream: Any) -> None:
    with contextlib.suppress(OSError, ValueError):
        fd = stream.fileno()  # first: what stands for a stream may have none
        null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(null, fd)
        os.close(null)


def fail(error: BaseException) -> int:
    """Print the one line that an error is worth, and return exit status 1."""
    return _complain(one_line(error))


def write_errors_as(form: str | None) -> None:
    """Set how this process, and those that it forks, write errors: "json", or as text."""
    global _errors_as_json
    _errors_as_json = form == "json"


def _complain(line: str) -> int:
    if _errors_as_json:
        from .log_writer import say_as  # here: only a server has a log in JSON

        say_as("json", line)
        return 1
    with contextlib.suppress(OSError, ValueError):  # stderr is closed
        print(f"ivshmem: {line}", file=sys.stderr)
    return 1


def one_line(error: BaseException) -> str:
    """An error as a person reads it: the path first, no errno, and what to do."""
    return plain(_sentence(error))


def _sentence(error: BaseException) -> str:
    if not isinstance(error, OSError) or error.strerror is None:
        return " ".join(str(error).split())
    hint = (
        _HINTS.get(error.errno or 0, "") if error.strerror == os.strerror(error.errno or 0) else ""
    )
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror[:1].lower()}{error.strerror[1:]}{hint}"


# Python's own errno subclasses say what and where; these add what to do.
_HINTS = {
    1: ": run as a user with the permission, or choose another path",  # EPERM
    2: ": create it first, or choose another path",  # ENOENT
    12: f": {_REMEDY}",  # ENOMEM
    13: ": run as a user with the permission, or choose another path",  # EACCES
    20: ": a part of the path is a file: choose another path",  # ENOTDIR
    21: ": give a file in that directory",  # EISDIR
    24: ": raise the limit with `ulimit -n`",  # EMFILE
    27: ": raise the limit with `ulimit -f unlimited`, or choose another file system",  # EFBIG
    28: ": free some space, or choose another file system",  # ENOSPC
    30: ": choose a path on a writable file system",  # EROFS
}
