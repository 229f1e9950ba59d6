"""The house rules: modules import from lower floors only; what is public is explained."""

from __future__ import annotations

import ast
import inspect
import pkgutil
import pydoc
import re
from pathlib import Path

import pytest

import ivshmem

HOME = Path(ivshmem.__file__).parent

# From the ground up. A module imports from lower floors only.
FLOORS: list[list[str]] = [
    ["counting", "errors", "logs", "named", "openers", "plain", "uncopied"],
    ["sizes", "limits", "accounts", "emulators", "notify", "shapes", "_fds"],
    ["keeper", "locks", "safe_files", "turns"],
    ["drafts"],
    ["_wire", "_memory", "_spin"],
    ["_bell"],
    ["_core"],
    ["pages", "journal", "loop"],
    ["protocol"],
    ["region"],
    ["endpoint", "sockets"],
    ["directory", "access", "replay", "answering", "image", "runtime"],
    ["engine", "config"],
    ["server", "client", "configfile", "opening", "changes", "snapshots"],
    ["service", "control"],
    ["handover", "reachable", "metrics", "stalls", "store"],
    ["guest"],
    ["channel", "aio", "bench", "qemu"],
    ["doctor", "migration"],
    ["cli"],
    ["__main__"],
]
FLOOR = {name: number for number, floor in enumerate(FLOORS) for name in floor}

# The standard library that does I/O, which the protocol must not know.
IO_MODULES = {
    "asyncio",
    "fcntl",
    "mmap",
    "os",
    "select",
    "selectors",
    "socket",
    "threading",
    "time",
}


def sources() -> list[Path]:
    return sorted([*HOME.rglob("*.py"), *HOME.glob("*.pyx")])


def module_of(path: Path) -> list[str]:
    parts = list(path.relative_to(HOME).with_suffix("").parts)
    return parts[:-1] if parts[-1] == "__init__" else parts


def absolute(path: Path, node: ast.ImportFrom) -> list[str]:
    """First names below the package of what an import statement reaches."""
    package = list(path.relative_to(HOME).parent.parts)
    if node.level == 0:
        if not (node.module or "").startswith("ivshmem"):
            return []
        base = (node.module or "").split(".")[1:]
    else:
        base = package[: len(package) - (node.level - 1)]
        base += (node.module or "").split(".") if node.module else []
    if base:
        return [base[0]]
    return [alias.name for alias in node.names]


def imports(path: Path) -> set[str]:
    """First names below the package of all that a module imports from it, at any place in it."""
    if path.suffix == ".pyx":
        names = re.findall(r"^\s*from \.(\w*) c?import (.*)$", path.read_text(), re.MULTILINE)
        return {name for name, _ in names} - {"_libc"}
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found.update(absolute(path, node))
        elif isinstance(node, ast.Import):
            found.update(
                alias.name.split(".")[1]
                for alias in node.names
                if alias.name.startswith("ivshmem.")
            )
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(HOME)))
def test_imports_go_down(path: Path) -> None:
    module = module_of(path)
    if not module:
        return  # __init__ re-exports; see below
    mine = FLOOR.get(module[0])
    assert mine is not None, f"{module[0]} stands on no floor: add it to FLOORS"
    for name in imports(path) - {module[0]}:
        if name == "__version__":
            continue
        assert name in FLOOR, (
            f"{path.name} imports {name} from the package itself, or from no floor"
        )
        below = FLOOR[name] < mine
        assert below, f"{path.name} (floor {mine}) imports {name} (floor {FLOOR[name]})"


def test_the_table_itself_can_fail() -> None:
    """The reader of imports sees each way of writing them."""
    tree = "from . import a, b\nfrom .c import d\nfrom .c.e import f\nimport ivshmem.g\n"
    tree += "def later():\n    from ivshmem.h import i\n    from ivshmem import j\n    import os\n"
    path = HOME / "client.py"
    nodes = [n for n in ast.walk(ast.parse(tree)) if isinstance(n, ast.ImportFrom)]
    assert sorted(name for n in nodes for name in absolute(path, n)) == list("abcchj")
    inner = HOME / "cli" / "serve.py"
    (node,) = ast.parse("from ..server import Server").body
    assert isinstance(node, ast.ImportFrom)
    assert absolute(inner, node) == ["server"]


def test_protocol_knows_no_io() -> None:
    for name in ("protocol", "errors", "sizes"):
        tree = ast.parse((HOME / f"{name}.py").read_text())
        imported = {
            alias.name.split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
        } | {
            (node.module or "").split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and not node.level
        }
        assert not imported & IO_MODULES
    assert not {"_fds", "_wire", "_memory", "_core"} & imports(HOME / "protocol.py")


def test_init_only_names_things() -> None:
    tree = ast.parse((HOME / "__init__.py").read_text())
    names = {"__all__", "__version__", "TYPE_CHECKING", "_HOMES", "_HOME_OF"}
    for node in tree.body[1:]:
        assigned = (
            isinstance(node, ast.Assign)
            and {target.id for target in node.targets if isinstance(target, ast.Name)} <= names
        )
        looked_up = isinstance(node, ast.FunctionDef) and node.name in {"__getattr__", "__dir__"}
        typed = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        assert assigned or looked_up or typed, ast.unparse(node)


def test_what_type_checkers_read_is_what_there_is() -> None:
    """The public names stand there for type checkers, for the lookup, and in __all__."""
    tree = ast.parse((HOME / "__init__.py").read_text())
    (typed,) = (node for node in tree.body if isinstance(node, ast.If))
    imported = {
        node.module: tuple(alias.name for alias in node.names)
        for node in typed.body
        if isinstance(node, ast.ImportFrom)
    }
    assert imported == ivshmem._HOMES


def test_all_is_complete_and_sorted() -> None:
    public = [name for names in ivshmem._HOMES.values() for name in names]
    names = [name for name in ivshmem.__all__ if not name.startswith("__")]
    assert names == sorted(public)
    assert not {module.name for module in pkgutil.iter_modules(ivshmem.__path__)} & {*public}
    assert {*names} <= {*dir(ivshmem)}
    for name in ivshmem.__all__:
        assert hasattr(ivshmem, name)


def test_every_error_is_public() -> None:
    from ivshmem import errors

    assert sorted(errors.__all__) == errors.__all__
    assert set(errors.__all__) <= set(ivshmem.__all__)
    for name in errors.__all__:
        assert issubclass(getattr(errors, name), errors.IvshmemError)
        assert name in (errors.__doc__ or "")


def public_members() -> list[tuple[str, object]]:
    """Public names, and public attributes of public classes that are their own."""
    found: list[tuple[str, object]] = [("ivshmem", ivshmem)]
    for name in ivshmem.__all__:
        thing = getattr(ivshmem, name)
        if name.startswith("__") or isinstance(thing, str):
            continue
        found.append((name, thing))
        if isinstance(thing, type):
            found += [
                (f"{name}.{attribute}", getattr(thing, attribute))
                for attribute, value in vars(thing).items()
                if not attribute.startswith("_")
                and (callable(value) or isinstance(value, property | classmethod | staticmethod))
            ]
    return found


@pytest.mark.parametrize(("name", "thing"), public_members(), ids=[n for n, _ in public_members()])
def test_help_explains(name: str, thing: object) -> None:
    if getattr(thing, "__origin__", None) is not None or not (
        isinstance(thing, type)
        or callable(thing)
        or isinstance(thing, property)
        or inspect.ismodule(thing)
    ):
        return  # a type alias
    doc = inspect.getdoc(thing)
    assert doc, f"{name} has no docstring"
    assert doc[0].isupper() or doc[0] == "`"
    assert pydoc.render_doc(thing)


def test_inherited_calls_are_explained_too() -> None:
    for name in ("ring", "wait", "fileno", "close", "events", "next_event", "vectors", "closed"):
        assert inspect.getdoc(getattr(ivshmem.Client, name)), name
    for name in ("info", "unlink", "close", "fileno", "address", "size", "populate", "resident"):
        assert inspect.getdoc(getattr(ivshmem.Region, name)), name
