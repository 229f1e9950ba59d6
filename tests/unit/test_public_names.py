"""What is public: the checked-in list of names and signatures, and what internal rooms say."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest
from support import public_names

import ivshmem
from ivshmem import guest

HOME = Path(__file__).parents[2] / "src/ivshmem"
PUBLIC_ROOMS = {"channel", "guest", "migration", "testing"}


def test_the_list_is_current() -> None:
    listing = public_names.listing()
    assert listing == public_names.LIST.read_text(), (
        "the interface has changed: look at the difference, and write the list again with"
        f" {public_names.REMEDY}"
    )


@pytest.mark.parametrize(
    "line",
    [
        "    .ring  (set when made)",  # AsyncEndpoint's
        "    .code  (set when made)",
        "    MigrationUnfinished(message: str, step: str, vm: str, path: str) -> None",
        "    .reasons  (set when made)",
        "    .region  (set when made)",
        "    .vector_range  (set when made)",
        "fixture ivshmem_device -> Iterator[FakeDevice]",
    ],
)
def test_what_only_an_object_has_is_listed(line: str) -> None:
    assert f"{line}\n" in public_names.listing()


def test_types_in_public_signatures_are_public() -> None:
    assert public_names.strangers(public_names.listing()) == set()


def test_a_stranger_is_found() -> None:
    text = "class A\n    .b(self, c: int | Hidden) -> list[Secret]\n    .d(self, e: f.Inner) -> A\n"
    assert public_names.strangers(text) == {"Hidden", "Inner", "Secret"}


def test_no_time_limit_is_the_default() -> None:
    """Except in ivshmem.testing, where a test of a broken server is to fail and not to hang."""
    modules = dict(re.findall(r"^\[(.*)\]\n((?:.+\n)+)", public_names.listing(), re.MULTILINE))
    assert modules.keys() == {*public_names.MODULES}
    defaults = {
        name: set(re.findall(r"\btimeout(?:: [^=,)]+ )?=? ?([\w.]+)", text))
        for name, text in modules.items()
    }
    assert defaults.pop("ivshmem.testing") == {"10.0"}
    assert set().union(*defaults.values()) == {"None"}


@pytest.mark.parametrize("name", public_names.MODULES)
def test_each_public_module_lists_its_names(name: str) -> None:
    module = importlib.import_module(name)
    assert sorted(module.__all__) == list(module.__all__)
    assert all(hasattr(module, public) for public in module.__all__)
    doc = ivshmem.__doc__ or ""
    assert name == "ivshmem" or name in doc, "the package's docstring names what is public"


def test_all_else_says_that_it_is_internal() -> None:
    public = {name.partition(".")[2] for name in public_names.MODULES}
    for path in HOME.glob("*/__init__.py"):
        doc = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert doc.startswith("Internal:") == (path.parent.name not in PUBLIC_ROOMS), path
    inside = [path for room in PUBLIC_ROOMS for path in HOME.glob(f"{room}/*.py")]
    assert len(inside) > 20
    for path in [*HOME.glob("*.py"), *inside]:
        if path.stem not in {"__init__", "__main__", *public, "fixtures"}:
            doc = ast.get_docstring(ast.parse(path.read_text())) or ""
            assert doc.startswith("Internal:"), path


# Internal rooms and modules, by path, by dotted name, or by the class that has no public name.
_INTERNAL = re.compile(
    r"\bivshmem\.(?:{rooms})\b|\b(?:{rooms})/\w+|\w+\.(?:py|pyx|pxd)\b|\b(?:{modules})\.(?=\w)"
    r"|\b(?:Engine|RegionServer|Roster)\b".format(
        rooms="|".join(path.parent.name for path in HOME.glob("*/__init__.py")),
        modules="|".join(
            {path.stem for path in HOME.glob("*/*.py*")}
            # Public modules, and variables of examples.
            - {"__init__", "client", "config", "control", "device", "directory", "endpoint"}
            - {"guest", "image", "loop", "region", "server", "service"}
        ),
    )
)


def internal_mentions(doc: str) -> list[str]:
    """What a docstring says of rooms and modules that users do not import."""
    of_public_rooms = tuple(f"ivshmem.{room}" for room in PUBLIC_ROOMS)
    return [each for each in _INTERNAL.findall(doc) if not each.startswith(of_public_rooms)]


@pytest.mark.parametrize("name", public_names.MODULES)
def test_help_names_nothing_internal(name: str) -> None:
    module = importlib.import_module(name)
    found = {}
    for public in module.__all__:
        thing = getattr(module, public)
        documented = {public: thing} if inspect.isroutine(thing) or isinstance(thing, type) else {}
        if isinstance(thing, type):
            members = {each for each in dir(thing) if not each.startswith("_")}
            documented |= {f"{public}.{each}": getattr(thing, each) for each in members}
        for where, each in documented.items():
            if mentions := internal_mentions(inspect.getdoc(each) or ""):
                found[where] = mentions
    assert not found


def test_internal_mentions_are_found() -> None:
    text = "see native/spin.pyx, ivshmem.server.log_events, sockets.Listener, Engine.hold"
    assert len(internal_mentions(text)) >= 4
    assert internal_mentions("see ivshmem.guest.open, Server.hold and asyncio.to_thread") == []


def test_star_imports_replace_nothing_of_python() -> None:
    """For instance `open` of ivshmem.guest."""
    for name in public_names.MODULES:
        assert not set(importlib.import_module(name).__all__) & set(dir(__builtins__)), name


USERS_CANNOT_MAKE = {
    "Client": "ivshmem.connect",
    "Directory": "Directory.create or Directory.open",
    "Doorbell": "Endpoint.doorbell",
    "Endpoint": "ivshmem.connect or ivshmem.guest.open",
    "Publication": "Directory.publish",
    "Region": "Region.create",
}


@pytest.mark.parametrize("name", USERS_CANNOT_MAKE)
@pytest.mark.parametrize("arguments", [(), (1, 2, 3)])
def test_a_constructor_that_is_not_for_users_says_what_is(
    name: str, arguments: tuple[int, ...]
) -> None:
    with pytest.raises(TypeError, match=USERS_CANNOT_MAKE[name]) as caught:
        getattr(ivshmem, name)(*arguments)
    assert "\n" not in str(caught.value)


def test_a_device_is_not_made_by_its_constructor() -> None:
    with pytest.raises(TypeError, match=r"guest\.open"):
        guest.GuestDevice()  # type: ignore[call-arg]
