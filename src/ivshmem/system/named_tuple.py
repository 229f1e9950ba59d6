"""Tuples with named fields, made as by `typing.NamedTuple`, without an import of typing.

Knows: how such a class is made. Does not know: any of them. typing would cost each start of a
command 4 ms, and each process that waits 1.7 MiB; dataclasses (with inspect) 10 ms and 2 MiB.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NamedTuple as NamedTuple
else:
    from collections import namedtuple

    class _Making(type):
        """Makes of a class body, which names fields and their defaults, a class of tuples."""

        def __new__(meta, name, bases, body):
            if not bases:
                return super().__new__(meta, name, bases, body)
            fields = list(body.get("__annotations__", ()))
            defaults = [body.pop(field) for field in fields if field in body]
            made = namedtuple(name, fields, defaults=defaults, module=body["__module__"])
            for key, value in body.items():  # no class on top of this one: that costs 0.1 ms
                setattr(made, key, value)
            return made

    class NamedTuple(metaclass=_Making):
        """The base to name in a class statement; the class that is made has tuple as its base."""
