"""Internal: the type of a channel's messages: dtype and shape of an array, or a schema in words.

Knows: how a type stands in memory, and what fits it. Does not know: channels.

The text in memory is any peer's to write. It is parsed against a short grammar, never evaluated,
and no dtype with Python objects comes out of it.

    schema WORDS                       anything, compared as it is
    array DTYPE SHAPE                  SHAPE: lengths with x between them; the first may be ?: any
    DTYPE = <f4 | name:<f4,other:<i4*3x2
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from ..errors import ChannelTypeError
from ..text import plain

if TYPE_CHECKING:
    from collections.abc import Sequence

_SCALAR = re.compile(
    r"\|[biu]1|[<>](?:[iu][248]|f[248]|c(?:8|16)"
    r"|[Mm]8\[(?:[1-9]\d{0,8})?(?:Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as)\])|\|S[1-9]\d{0,8}",
    re.ASCII,
)
_SHAPE = re.compile(r"(?:\?|[1-9]\d{0,9})(?:x[1-9]\d{0,9}){0,15}", re.ASCII)
_FIELD = re.compile(r"(\w{1,32}):([^*,:]+)(?:\*([0-9x]+))?")


class ArrayType:
    """Messages that are arrays of one dtype.

    Args:
        dtype: as the text in memory has it.
        shape: lengths; the first may be None: any.
    """

    in_place = True  # what lies in memory is the message: it can be looked at where it lies
    undecodable = (ChannelTypeError,)  # what `decode` raises again for the same message

    def __init__(self, dtype: str, shape: tuple[int | None, ...]) -> None:
        self.dtype = dtype
        self.shape = shape
        self.itemsize = _itemsize(dtype)
        inner = math.prod(length for length in shape if length is not None)
        self.row = inner * self.itemsize
        if self.row >= 1 << 31:
            raise ChannelTypeError(f"{self}: {self.row} bytes are more than a message can have")

    @property
    def size(self) -> int | None:
        """Bytes of a message; None: it depends on its length."""
        return None if None in self.shape else self.row

    @property
    def text(self) -> str:
        shape = "x".join("?" if length is None else str(length) for length in self.shape)
        return f"array {self.dtype} {shape}"

    def __str__(self) -> str:
        return plain(self.text)

    def numpy(self) -> Any:
        """Return the numpy dtype; needs numpy."""
        import numpy  # an extra, which only arrays need

        if ":" not in self.dtype:
            return numpy.dtype(self.dtype)
        fields: list[Any] = []
        for part in self.dtype.split(","):
            name, scalar, inner = _FIELD.fullmatch(part).groups()  # type: ignore[union-attr]
            shape = tuple(map(int, inner.split("x"))) if inner else ()
            fields.append((name, scalar, shape))
        return numpy.dtype(fields)

    def array(self, buffer: Any) -> Any:
        """Return an array of this type over a buffer of a whole message."""
        import numpy  # an extra, which only arrays need

        shape = self._shape_of(memoryview(buffer).nbytes)  # first: it says what does not fit
        return numpy.frombuffer(buffer, self.numpy()).reshape(shape)

    def decode(self, data: bytes) -> Any:
        """Return an array that can be written, with a message's bytes."""
        return self.array(bytearray(data))

    def encode(self, data: Any) -> Any:
        """Return a buffer of what is to be sent.

        Raises:
            ChannelTypeError: it does not fit.
        """
        array = self._array_of(data)
        self._check(array.dtype, array.shape, "this")
        return array.view("uint8").reshape(-1) if array.size else b""

    def encode_rows(self, rows: Any) -> Any:
        """Return a buffer with two dimensions, whose rows are what is to be sent.

        Raises:
            ChannelTypeError: a row does not fit.
        """
        array = self._array_of(rows)
        self._check(array.dtype, array.shape[1:], "each row of this")
        size = array.nbytes // max(len(array), 1)
        return array.view("uint8").reshape(len(array), size)

    def check_size(self, size: int) -> None:
        """Refuse a message of `size` bytes if it cannot be of this type.

        Raises:
            ChannelTypeError: that.
        """
        if size % self.row or (size != self.row and None not in self.shape):
            raise ChannelTypeError(f"a message of {size} bytes is not {self}")

    def check_dtype(self, buffer: Any) -> None:
        """Refuse a buffer for messages whose elements are others than the type's.

        Raises:
            ChannelTypeError: that.
        """
        import numpy  # an extra, which only arrays need

        kind = numpy.asarray(buffer).dtype
        if kind != self.numpy():
            raise ChannelTypeError(f"the channel has messages of {self}, and this is for {kind}")

    def interface(self, size: int) -> tuple[str, tuple[int, ...]]:
        """Return typestr and shape for __array_interface__ of a message of `size` bytes."""
        if ":" in self.dtype:
            return f"|V{self.itemsize}", self._shape_of(size)
        return self.dtype, self._shape_of(size)

    def _array_of(self, data: Any) -> Any:
        import numpy  # an extra, which only arrays need

        return numpy.asarray(data, order="C")

    def _check(self, dtype: Any, shape: Sequence[int], what: str) -> None:
        if (
            dtype != self.numpy()
            or len(shape) != len(self.shape)
            or any(
                wanted not in (None, length)
                for wanted, length in zip(self.shape, shape, strict=True)
            )
        ):
            raise ChannelTypeError(
                f"the channel has messages of {self}, and {what} is an array of {dtype} with shape"
                f" {shape}"
            )

    def _shape_of(self, size: int) -> tuple[int, ...]:
        self.check_size(size)
        return tuple(size // self.row if length is None else length for length in self.shape)


def _itemsize(dtype: str) -> int:
    """Return the bytes of an element.

    Raises:
        ChannelTypeError: the text is not one of the dtypes that are allowed.
    """
    if ":" not in dtype:
        if not _SCALAR.fullmatch(dtype):
            raise ChannelTypeError(f"dtype {plain(dtype)!r} is not allowed in a channel")
        return _scalar_size(dtype)
    total = 0
    names = set()
    for part in dtype.split(","):
        match = _FIELD.fullmatch(part)
        if (
            match is None
            or match[1] in names
            or not _SCALAR.fullmatch(match[2])
            or (match[3] and not _SHAPE.fullmatch(match[3]))
        ):
            raise ChannelTypeError(f"dtype {plain(dtype)!r} is not allowed in a channel")
        names.add(match[1])
        count = math.prod(map(int, match[3].split("x"))) if match[3] else 1
        total += _scalar_size(match[2]) * count
    return total


def _scalar_size(scalar: str) -> int:
    if "[" in scalar:
        return 8
    return int(scalar[2:])


def array_type(dtype: Any, shape: Any) -> ArrayType:
    """Return the type of arrays of a numpy dtype, or of what numpy.dtype() takes.

    Args:
        shape: lengths, the first of which may be None or -1: any; None: one dimension of any
            length.

    Raises:
        ChannelTypeError: a dtype with Python objects, with padding, or of a kind that is not
            allowed.
    """
    if shape is None:
        lengths: tuple[int | None, ...] = (None,)
    else:
        given = shape if hasattr(shape, "__iter__") else (shape,)
        lengths = tuple(None if length in (None, -1) else int(length) for length in given)
    if (
        any(length is not None and length < 1 for length in lengths)
        or None in lengths[1:]
        or not lengths
    ):
        raise ChannelTypeError(f"shape {shape!r}: lengths of 1 or more; only the first may be any")
    return ArrayType(_text_of(dtype), lengths)


def _text_of(dtype: Any) -> str:
    if isinstance(dtype, str) and _SCALAR.fullmatch(dtype):
        return dtype
    import numpy  # an extra; a dtype by its short text needs no numpy

    kind = numpy.dtype(dtype)
    if kind.hasobject:
        raise ChannelTypeError(f"dtype {kind}: it would hold addresses of this process")
    if kind.names is None:
        return str(kind.str)
    fields = []
    end = 0
    for name in kind.names:
        inner, offset = kind.fields[name][:2]
        if offset != end:
            raise ChannelTypeError(f"dtype {kind}: a channel's dtype has no padding")
        end += inner.itemsize
        scalar, lengths = (inner, ()) if inner.subdtype is None else inner.subdtype
        shape = "x".join(map(str, lengths))
        fields.append(f"{name}:{scalar.str}{f'*{shape}' if shape else ''}")
    if end != kind.itemsize:
        raise ChannelTypeError(f"dtype {kind}: a channel's dtype has no padding")
    return ",".join(fields)


def parse(text: str) -> ArrayType | None:
    """Return the type that stands in memory; None: no type, or a schema.

    Raises:
        ChannelTypeError: an array's type that is not allowed.
    """
    if not text.startswith("array "):
        return None
    parts = text.split(" ")
    if len(parts) != 3 or not _SHAPE.fullmatch(parts[2]):
        raise ChannelTypeError(f"type {plain(text)!r} of a channel is not allowed")
    lengths = tuple(None if part == "?" else int(part) for part in parts[2].split("x"))
    return ArrayType(parts[1], lengths)
