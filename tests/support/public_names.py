"""The list of all public names with their signatures, as the package that is installed has them.

`PYTHONPATH=tests .venv/bin/python -m support.public_names --write` writes it to
tests/unit/public_names.txt, which is checked in: so a review sees each change of the interface.
Knows: what inspect tells,
and which attributes the code that makes an object sets.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Generic

MODULES = (
    "ivshmem",
    "ivshmem.aio",
    "ivshmem.channel",
    "ivshmem.config",
    "ivshmem.control",
    "ivshmem.guest",
    "ivshmem.migration",
    "ivshmem.testing",
)
LIST = Path(__file__).parents[1] / "unit/public_names.txt"
REMEDY = "PYTHONPATH=tests .venv/bin/python -m support.public_names --write"
# Signatures of classes that users cannot make, or whose constructor says nothing by itself.
_NO_CONSTRUCTOR = ("(?)", "(*args, **kwargs)", "(*_: object, **__: object) -> None")
_HEAD = f"""\
# All public names with their signatures. Generated; a change of the interface changes this file.
# {REMEDY}
"""


def listing() -> str:
    """Return what the file should hold."""
    lines = [_HEAD]
    for name in MODULES:
        module = importlib.import_module(name)
        lines.append(f"[{name}]")
        for public in sorted(module.__all__, key=str.lower):
            lines += _described(public, getattr(module, public))
        if name == "ivshmem.testing":
            lines += _fixtures()
        lines.append("")
    return "\n".join(lines)


def _described(name: str, thing: object) -> Iterator[str]:
    if isinstance(thing, type):
        bases = ", ".join(base.__name__ for base in thing.__bases__ if _is_public(base))
        yield f"class {name}({bases})" if bases else f"class {name}"
        signature = _signature(thing)
        plain = issubclass(thing, BaseException) and not _has_own(thing, "__init__")
        if signature not in _NO_CONSTRUCTOR and not plain:
            yield f"    {name}{signature}"
        for attribute, annotation in sorted(_annotations(thing).items()):
            yield f"    .{attribute}: {annotation}"
        members = _members(thing)
        for attribute in sorted(_set_when_made(thing) - members - {*_annotations(thing)}):
            yield f"    .{attribute}  (set when made)"
        for attribute in sorted(members):
            yield f"    .{attribute}{_member(inspect.getattr_static(thing, attribute))}"
    elif inspect.isroutine(thing):
        kind = "async def" if inspect.iscoroutinefunction(thing) else "def"
        yield f"{kind} {name}{_signature(thing)}"
    elif isinstance(thing, str | int | float):
        yield f"{name} = {thing!r}"
    else:
        text = re.sub(r"\b(typing|collections\.abc)\.", "", str(thing))
        yield f"type {name} = {re.sub(r'ivshmem[a-z_.]*[.]', '', text)}"


def _is_public(kind: type) -> bool:
    """Whether a base class is one that users know."""
    if kind.__module__.partition(".")[0] != "ivshmem":
        return kind not in (object, Generic)
    return any(kind.__name__ in importlib.import_module(name).__all__ for name in MODULES)


def _members(kind: type) -> set[str]:
    """Return the public attributes that the class, or a base from this package, defines."""
    return {
        name
        for base in _own_classes(kind)
        for name, value in vars(base).items()
        if not name.startswith("_")
        and name not in getattr(kind, "_fields", ())
        and not (name in _annotations(kind) and not callable(value))
    }


def _own_classes(kind: type) -> list[type]:
    return [each for each in kind.__mro__ if each.__module__.partition(".")[0] == "ivshmem"]


def _has_own(kind: type, name: str) -> bool:
    return any(name in vars(each) for each in _own_classes(kind))


# What makes an object, or does for an existing one what a constructor would.
_MAKERS = ("__init__", "_begin", "_over", "_set_up", "_plug_in")


def _set_when_made(kind: type) -> set[str]:
    """Return the public attributes that the code which makes an object stores in it."""
    found = set()
    for base in _own_classes(kind):
        for maker in _MAKERS:
            made = vars(base).get(maker)
            made = getattr(made, "__func__", made)
            if not inspect.isfunction(made) or not made.__code__.co_filename.endswith(".py"):
                continue  # that of Cython or of a dataclass
            tree = ast.parse(textwrap.dedent(inspect.getsource(made)))
            found |= {
                node.attr
                for node in ast.walk(tree)
                if isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and isinstance(node.value, ast.Name)
                and node.value.id == "self"
                and not node.attr.startswith("_")
            }
    return found


def _fixtures() -> Iterator[str]:
    """Yield the fixtures of ivshmem.testing, as a test names them."""
    module = importlib.import_module("ivshmem.testing.fixtures")
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.FunctionDef) and node.decorator_list and node.returns:
            yield f"fixture {node.name} -> {ast.unparse(node.returns)}"


def _annotations(kind: type) -> dict[str, str]:
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if base.__module__.partition(".")[0] == "ivshmem":
            found.update(inspect.get_annotations(base))
    return {name: _plain(str(text)) for name, text in found.items() if not name.startswith("_")}


def _member(value: object) -> str:
    if isinstance(value, property):
        result = inspect.signature(value.fget).return_annotation if value.fget else ""
        return f" -> {_plain(result)}  (property)" if isinstance(result, str) else "  (property)"
    if isinstance(value, classmethod | staticmethod):
        return f"{_signature(value.__func__)}  ({type(value).__name__})"
    if not callable(value):
        return "  (attribute)"
    late = "  (async)" if inspect.iscoroutinefunction(value) else ""
    return f"{_signature(value)}{late}"


def _signature(thing: object) -> str:
    try:
        signature = inspect.signature(thing)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return "(?)"
    signature = signature.replace(
        parameters=[
            parameter.replace(annotation=_Bare(_plain(parameter.annotation)))
            if parameter.annotation is not parameter.empty
            else parameter
            for parameter in signature.parameters.values()
        ],
        return_annotation=_Bare(_plain(signature.return_annotation))
        if signature.return_annotation is not signature.empty
        else signature.empty,
    )
    return re.sub(r"<function .*? at 0x[0-9a-f]+>", "...", str(signature))


class _Bare(str):
    """An annotation that stands in a signature without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _plain(annotation: object) -> str:
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\b(typing|collections\.abc)\.", "", text)


# -- which types occur -----------------------------------------------------------------------------

_KNOWN = {
    *dir(builtins),
    *("Any", "AsyncIterator", "Callable", "Collection", "Coroutine", "Counter", "Iterable"),
    *("Iterator", "Literal", "Mapping", "NoReturn", "Path", "PathLike", "Sequence"),
    *("Formatter", "SupportsIndex"),
}


def strangers(text: str) -> set[str]:
    """Return the types in such a list that are neither public nor everybody's."""
    public = set(re.findall(r"^(?:class|type|def|async def) (\w+)", text, re.MULTILINE))
    signatures = re.sub(r"Literal\[[^]]*\]|'[^']*'|= ?[\w.'-]+", "", text)
    used = set(re.findall(r"(?:: |-> |[\[|,(] ?)(?:\w+\.)*([A-Z]\w+)", signatures))
    return {name for name in used - public - _KNOWN if not re.fullmatch(r"_?[A-Z]", name)}


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(f"usage: {REMEDY}")
    LIST.write_text(listing())
