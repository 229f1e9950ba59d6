"""Messages of channels on standard output: as they are, as text, as hex, or as arrays.

Knows: how bytes of strangers are shown, and where they may be written as they are. Does not know:
where a message comes from.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import importlib.util
import json
import sys
from typing import Any

from ..channel.types import ArrayType
from ..errors import ChannelTypeError
from ..text import MOST, plain

FORMS = ("text", "hex", "array")


def add_form(parser: argparse.ArgumentParser) -> None:
    """Add the option that says how messages are shown."""
    parser.add_argument(
        "--as",
        dest="form",
        choices=FORMS,
        help="how messages are shown (default: array, which needs numpy, if the channel has a"
        " dtype; else text)",
    )


class Form:
    """How messages of a channel are shown.

    Args:
        wanted: text, hex or array; None: by the type.
        kind: of the channel's messages; None: it has no dtype.
        name: of the channel, for errors.

    Raises:
        ChannelTypeError: an array without a dtype.
        ValueError: an array without numpy.
    """

    def __init__(self, wanted: str | None, kind: ArrayType | None, name: str) -> None:
        numpy = importlib.util.find_spec("numpy") is not None
        if wanted == "array" and kind is None:
            raise ChannelTypeError(
                f"channel {name!r} has no dtype: its messages can be shown as text or hex"
            )
        if wanted == "array" and not numpy:
            raise ValueError("arrays need numpy: pip install numpy, or --as hex")
        by_type = "text" if kind is None else "array" if numpy else "hex"
        self.name = wanted or by_type
        self._kind = kind

    def line(self, message: bytes) -> str:
        """Return a message as text that a terminal can show."""
        if (array := self._array(message)) is not None:
            return str(array)
        if self.name == "text":
            return plain(message.removesuffix(b"\n"))
        return message.hex(" ")

    def _array(self, message: bytes) -> Any:
        """The array; None: it is to be shown in another way, or its size does not fit the dtype."""
        if self.name == "array" and self._kind is not None:
            with contextlib.suppress(ChannelTypeError):  # a program in C can send any size
                return self._kind.decode(message)
        return None

    def shortened(self, message: bytes) -> str:
        """Return the same, not longer than a person reads."""
        return plain(self.line(message[: MOST + 1])) if self.name == "hex" else self.line(message)

    def value(self, message: bytes) -> Any:
        """Return a message for JSON: a string, or a list of an array's elements.

        A message that is not UTF-8 is an object {"base64": ..}: no string can be mistaken for it.
        """
        if (array := self._array(message)) is not None:
            return array.tolist()
        if self.name != "text":
            return message.hex()
        try:
            return message.decode()
        except UnicodeDecodeError:
            return {"base64": base64.b64encode(message).decode()}


def json_line(**facts: Any) -> str:
    """Return one JSON object as a line; what JSON lacks (bytes, complex numbers) is text."""
    return json.dumps(facts, default=str)


class Output:
    """Writes messages to standard output, and counts them.

    Args:
        most: how many; None: no limit.
        lines: a newline follows each message that is written as it is.
        form: how they are shown; None: as they are, and on a terminal as text.
    """

    def __init__(self, most: int | None, lines: bool, form: Form | None = None) -> None:
        self.most = most
        self.shown = 0
        self._end = b"\n" if lines else b""
        self._terminal = sys.stdout.isatty()
        self._form = form
        self._raw = form is None or form.name == "text"

    def show(self, message: bytes) -> bool:
        """Write one; whether more are to come."""
        if self._raw and not self._terminal:
            sys.stdout.buffer.write(message + self._end)
            sys.stdout.buffer.flush()
            return self._counted()
        if self._form is None:
            return self.print(plain(message.removesuffix(b"\n")))
        return self.print(
            self._form.shortened(message) if self._terminal else self._form.line(message)
        )

    def print(self, line: str) -> bool:
        """Write a line that stands for a message; whether more are to come."""
        print(line, flush=True)
        return self._counted()

    def _counted(self) -> bool:
        self.shown += 1
        return self.shown != self.most
