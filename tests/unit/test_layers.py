"""The house rules: rooms import from rooms below only; what is public is explained."""

from __future__ import annotations

import ast
import functools
import inspect
import pkgutil
import pydoc
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import ivshmem

# The checkout's, which has the files in Cython, too.
HOME = Path(__file__).parents[2] / "src/ivshmem"

# What each room may import: a room stands below all that import it. "" are the modules beside the
# rooms that programs import by themselves.
ROOMS: dict[str, str] = {
    "text": "",
    "errors": "text",
    "native": "text errors",
    "_core": "text errors native",
    "system": "text errors native",
    "lasting": "text errors native system",
    "protocol": "text errors system",
    "memory": "text errors native system",
    "qemu": "text errors system memory",
    "peer": "text errors native _core system protocol memory",
    "channel": "text errors native _core system memory peer",
    "recording": "text errors native system memory peer channel",
    "server": "text errors native system lasting protocol memory qemu peer",
    "service": "text errors native system lasting protocol memory qemu peer server",
    "config": "errors service",
    "control": "errors service",
    "guest": "text errors native _core system protocol memory peer server",
    "aio": "text errors native _core system memory peer guest",
    "testing": "text errors native _core system protocol memory peer server guest",
    "forward": "text errors system memory peer channel service",
    "tracing": "text errors native system protocol peer",
    "doctor": "text errors system memory qemu peer service guest",
    "migration": "text errors native system memory qemu server service",
    "bench": "text errors system memory peer server",
    "cli": "text errors native _core system lasting protocol memory qemu peer server service guest"
    " doctor migration bench channel recording forward tracing",
    "__main__": "cli",
}

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


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def sources() -> list[Path]:
    alone = [path for path in HOME.rglob("*.pxd") if not path.with_suffix(".pyx").exists()]
    return sorted([*HOME.rglob("*.py"), *HOME.rglob("*.pyx"), *alone])


def module_of(path: Path) -> list[str]:
    parts = list(path.relative_to(HOME).with_suffix("").parts)
    return parts[:-1] if parts[-1] == "__init__" else parts


MODULES = {".".join(module_of(path)): path for path in sources()}


def reached(path: Path, node: ast.ImportFrom) -> list[str]:
    """Modules of the package, as "room.module", that an import statement reaches."""
    package = list(path.relative_to(HOME).parent.parts)
    if node.level == 0:
        if (node.module or "").split(".")[0] != "ivshmem":
            return []
        base = (node.module or "").split(".")[1:]
    else:
        base = package[: len(package) - (node.level - 1)]
        base += (node.module or "").split(".") if node.module else []
    found = []
    for alias in node.names:
        full = ".".join([*base, alias.name])
        found.append(full if full in MODULES else ".".join(base))
    return found


class Import(NamedTuple):
    module: str
    line: int
    later: bool  # in a function


def imports(path: Path) -> list[Import]:
    """All that a module imports from the package, at any place in it.

    What only type checkers read (TYPE_CHECKING) counts, too: to name a type is to know it.
    """
    if path.suffix == ".py":
        return list(_imports(path, parsed(path), later=False))
    parts = {path, path.with_suffix(".pxd")}  # what is declared, and what is defined
    return [
        each
        for part in sorted(parts)
        if part.exists()
        for tree, line in cython_imports(part.read_text())
        for each in _imports(part, tree, later=False, line=line)
    ]


_CYTHON_IMPORT = re.compile(
    r"^[ \t]*(?:from[ \t]+[.\w]+[ \t]+)?c?import[ \t]+(?:\([^)]*\)|(?:[^\n(\\]|\\\n)+)",
    re.MULTILINE,
)


def cython_imports(source: str) -> Iterator[tuple[ast.Module, int]]:
    """The imports of a Cython file, as Python has them, each with its line."""
    for found in _CYTHON_IMPORT.finditer(source):
        text = re.sub(r"\bcimport\b", "import", found[0].strip())
        yield ast.parse(text), source.count("\n", 0, found.start()) + 1


def _imports(path: Path, tree: ast.AST, *, later: bool, line: int = 1) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ImportFrom):
            for name in reached(path, node):
                yield Import(name, line + node.lineno - 1, later)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "ivshmem":
                    yield Import(alias.name.partition(".")[2], line + node.lineno - 1, later)
        inner = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        yield from _imports(path, node, later=later or inner, line=line)


def test_imports_go_down() -> None:
    wrong = []
    for path in sources():
        room = ".".join(module_of(path)).partition(".")[0]
        if not room:
            continue  # __init__ re-exports; see below
        assert room in ROOMS, f"{room} is not a room: add it to ROOMS"
        lines = path.read_text().splitlines()
        for name, line, _ in imports(path):
            where = f"{path.relative_to(HOME)}:{line}"
            other = name.partition(".")[0]
            if (path.suffix, name) == (".py", "") and not lines[line - 1].endswith(
                "import __version__"
            ):
                wrong.append(f"{where} imports the package itself")
            elif name and other not in {room, *ROOMS[room].split()}:
                wrong.append(f"{where}: {room} may not import {other}")
    assert not wrong


_DIRECTIVE = re.compile(r"#\s*(noqa|type:)\S*(\s|$)")


def _is_reason(line: str) -> bool:
    _, mark, comment = line.partition("#")
    return bool(mark) and not _DIRECTIVE.match(f"#{comment}")


def without_reason(source: str) -> Iterator[str]:
    """Imports in functions that no comment explains: on their lines, or above their block.

    What tells linters and type checkers something is not an explanation.
    """
    lines = source.splitlines()
    explained: set[int] = set()  # the lines after those that are

    for node in inner_imports(ast.parse(source)):
        last = node.end_lineno or node.lineno
        above = node.lineno - 1
        if (
            above in explained
            or (lines[above - 1].lstrip().startswith("#") and _is_reason(lines[above - 1]))
            or any(map(_is_reason, lines[node.lineno - 1 : last]))
        ):
            explained.add(last)
        else:
            yield ast.unparse(node)


def inner_imports(tree: ast.AST, *, inside: bool = False) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and inside:
            yield node
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from inner_imports(node, inside=inside or function)


def test_an_import_in_a_function_has_a_reason() -> None:
    found = {
        f"{path.relative_to(HOME)}: {statement}"
        for path in sorted(HOME.rglob("*.py"))
        for statement in without_reason(path.read_text())
    }
    for path in sorted(HOME.rglob("*.pyx")):
        lines = path.read_text().splitlines()
        for _, number in cython_imports(path.read_text()):
            if lines[number - 1].startswith(" ") and not any(
                _is_reason(line) for line in lines[number - 2 : number]
            ):
                found.add(f"{path.relative_to(HOME)}: {lines[number - 1].strip()}")
    assert not found, "say why on the line, or above: see CONTRIBUTING.md"


def test_the_reader_of_reasons_can_fail() -> None:
    def read(*lines: str) -> list[str]:
        return list(without_reason("def f():\n" + "\n".join(f"    {line}" for line in lines)))

    assert read("import json") == ["import json"]
    assert read("import json  # noqa: F401") == ["import json"]
    assert read("# noqa: F401", "import json") == ["import json"]
    assert read("import json  # here: few need it") == []
    assert read("# Here: few need these.", "import json", "import zlib") == []
    assert read("import json  # here: few need it", "x = 1", "import zlib") == ["import zlib"]
    assert list(without_reason("import json\nclass C:\n    import zlib\n")) == []


def test_rooms_stand_on_one_another() -> None:
    """Each room imports only rooms that stand before it in the table."""
    names = list(ROOMS)
    for number, room in enumerate(names):
        assert set(ROOMS[room].split()) <= set(names[:number])
    folders = {path.parent for path in HOME.rglob("*.py")} - {HOME}
    assert {path.parent.name for path in HOME.glob("*/__init__.py")} <= set(names)
    assert {str(path.relative_to(HOME)) for path in folders} <= set(names)
    assert all((path / "__init__.py").exists() for path in folders)


def test_the_table_of_the_architecture_fits_this_one() -> None:
    """A room's line names rooms that it may import, and all others stand below one of those."""
    page = (HOME.parents[1] / "ARCHITECTURE.md").read_text()
    rows = re.findall(r"^\| `(\w+)(?:/|\.pyx?)` \|.*\| ?([^|]*?) ?\|$", page, re.MULTILINE)
    assert {*ROOMS} - {room for room, _ in rows} == {"config", "control", "__main__"}
    for room, cell in rows:
        allowed = {*ROOMS[room].split()}
        named = allowed if cell == "everything" else {*re.findall(r"\w+", cell)} - {"and", "below"}
        below = named.union(*(ROOMS[name].split() for name in named))
        assert named <= allowed <= below, f"{room}: {sorted(named ^ allowed)}"


def test_no_circle_in_a_room() -> None:
    after = {
        name: {
            other
            for other, _, _ in imports(path)
            if name.partition(".")[0] == other.partition(".")[0] and other != name
        }
        for name, path in MODULES.items()
        if "." in name
    }
    while after:
        free = {name for name, needs in after.items() if not needs & after.keys()}
        assert free, f"circles among {sorted(after)}"
        for name in free:
            del after[name]


def test_an_internal_room_has_an_empty_init() -> None:
    """Whoever imports one module of a room does not import all of it."""
    for path in HOME.glob("*/__init__.py"):
        if path.parent.name not in {"channel", "guest", "migration", "testing"}:
            (only,) = parsed(path).body
            assert isinstance(only, ast.Expr), path


def test_the_table_itself_can_fail() -> None:
    """The reader of imports sees each way of writing them."""
    tree = "from . import server, access\nfrom ..memory.sizes import d\n"
    tree += "if TYPE_CHECKING:\n    from .report import Peer\n"
    tree += "def later():\n    from ivshmem.cli import doctor\n    from ivshmem import j\n"
    path = HOME / "server" / "engine.py"
    nodes = [n for n in ast.walk(ast.parse(tree)) if isinstance(n, ast.ImportFrom)]
    names = [name for n in nodes for name in reached(path, n)]
    assert sorted(names) == [
        *("", "cli.doctor", "memory.sizes", "server.access", "server.report", "server.server")
    ]
    found = list(_imports(path, ast.parse(tree + "import ivshmem.g\n"), later=False))
    assert [each.module for each in found if each.later] == ["cli.doctor", ""]
    assert found[-1].module == "g"


def test_imports_in_cython_are_read() -> None:
    source = """
from libc.stdint cimport uint64_t
from . import streams, nothing  # why
from ..native.wire cimport (
    one,
    two,
)
def f():
    from ivshmem.cli import \\
        doctor
    cimport ivshmem.native.bell
"""
    path = HOME / "channel/calls.pyx"
    found = [
        (each.module, each.line)
        for tree, line in cython_imports(source)
        for each in _imports(path, tree, later=False, line=line)
    ]
    assert found == [
        ("channel.streams", 3),
        ("channel", 3),
        ("native.wire", 4),
        ("native.wire", 4),
        ("cli.doctor", 9),
        ("native.bell", 11),
    ]


def test_protocol_knows_no_io() -> None:
    for path in [*(HOME / "protocol").glob("*.py"), HOME / "errors.py", HOME / "memory/sizes.py"]:
        tree = parsed(path)
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


def named_types(tree: ast.AST) -> list[str]:
    """Classes, and aliases of types, which are assigned and have capital and small letters."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            found.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            found += [name for name in names if re.fullmatch(r"_?[A-Z]+[a-z]\w*", name)]
    return list(dict.fromkeys(found))


def test_types_are_found() -> None:
    tree = ast.parse("class A:\n    _Bc: TypeAlias = int\nDe = Callable[[int], str]\nF = G = 1\n")
    assert named_types(tree) == ["A", "De", "_Bc"]


def test_a_class_name_means_one_thing() -> None:
    """A private class's name counts without its underscore."""
    homes: dict[str, list[str]] = {}
    for path in sources():
        if path.suffix != ".py":
            names = re.findall(r"^(?:cdef )?class (\w+)", path.read_text(), re.MULTILINE)
        else:
            names = named_types(parsed(path))
        for name in names:
            homes.setdefault(name.lstrip("_"), []).append(str(path.relative_to(HOME)))
    assert len(homes) > 100
    several = {name: found for name, found in homes.items() if len(found) > 1}
    assert not several


# What a program catches by its base.
INTERNAL_ERRORS = {
    *("AlreadyMigrated", "CommandError", "GroupHeld", "HandoverError", "JournalError"),
    *("MetricsError", "Misshapen", "NoAnswer", "QemuGone", "StepFailed", "UnplugPending"),
    *("UnplugRefused", "VfioUnusable", "WorkerFailed", "WrongAnswer", "WrongKind"),
    "WrongKindDirectory",
}


def test_the_exception_tree_is_one_file() -> None:
    """Each class stands in errors.py and its tree, and is public in one place, or internal."""
    from ivshmem import channel, config, control, errors, migration

    found = {name for name, thing in vars(errors).items() if isinstance(thing, type)}
    public = {
        name
        for module in (ivshmem, channel, config, control, migration)
        for name in module.__all__
        if name in found
    }
    assert found - public == INTERNAL_ERRORS
    tree = errors.__doc__ or ""
    for name in found:
        base = getattr(errors, name).__bases__[0].__name__
        assert re.search(rf"^ .*\+-- {name}\b|^    {name}$", tree, re.MULTILINE), name
        assert base in {*found, "Exception", "OSError", "RuntimeError"}
    for path in HOME.rglob("*.py"):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ClassDef) and path != HOME / "errors.py":
                bases = {ast.unparse(base) for base in node.bases}
                assert not any(re.search(r"(Error|Exception)$", base) for base in bases), node.name
                assert not bases & found, node.name


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


def test_help_explains() -> None:
    for name, thing in public_members():
        if getattr(thing, "__origin__", None) is not None or not (
            isinstance(thing, type | property) or callable(thing) or inspect.ismodule(thing)
        ):
            continue  # a type alias
        doc = inspect.getdoc(thing)
        assert doc, f"{name} has no docstring"
        assert doc[0].isupper() or doc[0] == "`", name
        assert pydoc.render_doc(thing)


def test_inherited_calls_are_explained_too() -> None:
    for name in ("ring", "wait", "fileno", "close", "events", "next_event", "vectors", "closed"):
        assert inspect.getdoc(getattr(ivshmem.Client, name)), name
    for name in ("info", "unlink", "close", "fileno", "address", "size", "populate", "resident"):
        assert inspect.getdoc(getattr(ivshmem.Region, name)), name
