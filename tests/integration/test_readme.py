"""README.md, docs/ and the other documents: what they show runs, what they name exists.

- Every block of Python runs, with a server and peers; a guest's device is a client there.
  (test_readme_commands.py runs the commands.)
- Every option, `make` target, file and link that a page names exists.
- Reference pages list every setting, log event, metric and request that the source has.
"""

from __future__ import annotations

import configparser
import contextlib
import functools
import inspect
import io
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from support.pages import HOME, PAGES, README, blocks, name_of, shell_lines
from support.served import Served

import ivshmem
from ivshmem import control, errors
from ivshmem.cli import guest as guest_commands
from ivshmem.cli import main, shell
from ivshmem.config import RegionConfig, ServiceConfig
from ivshmem.forward import config_file as forward_file
from ivshmem.migration import group_file
from ivshmem.server import records
from ivshmem.service import config_file, config_values, control_client, metrics

IDS = [name_of(page) for page in PAGES]
PUBLIC = ("aio", "channel", "config", "control", "guest", "migration", "testing")
each_page = pytest.mark.parametrize("page", PAGES, ids=IDS)

# A guest's device has the interface of a client, so a client stands for it here.
PRELUDE = """
import faulthandler, ivshmem, ivshmem.guest
faulthandler.dump_traceback_later(45, exit=True)
ivshmem.guest.open = lambda address=None, **more: ivshmem.connect({path!r}, timeout=30)
"""


@contextlib.contextmanager
def a_server(path: str) -> Iterator[None]:
    """A server with names and a control socket, and four peers; peer 0 answers interrupts."""
    ended = threading.Event()

    def answer() -> None:
        while not ended.is_set():
            if peers[0].wait(0, timeout=0.02):
                peers[0].ring_all()
            for peer in peers:
                _ = peer.peers  # so that it reads its news

    with contextlib.ExitStack() as stack:
        stack.enter_context(Served(path, 4, 4 << 20, names=0, channels=1 << 20))
        peers = [stack.enter_context(ivshmem.connect(path, timeout=30)) for _ in range(4)]
        names = stack.enter_context(ivshmem.Directory.open(peers[1]))
        names.publish("sensor")
        thread = threading.Thread(target=answer)
        thread.start()
        stack.callback(thread.join)
        stack.callback(ended.set)
        yield


def placed(text: str, path: str, folder: Path) -> str:
    """Names and paths of an example, where a test can have them."""
    text = re.sub(r"(/run/[\w-]+|/tmp/example)\.sock\b", path, text)
    text = re.sub(r"/tmp/example_(\w+)", rf"{folder}/\1", text)
    return re.sub(r'name="([\w-]*frames)"', rf'name="\1-{os.getpid()}"', text)


# -- what runs ------------------------------------------------------------------------------------


def test_the_example_runs() -> None:
    example = next(block for block in blocks(README, "python") if "ivshmem.Server(" in block)
    assert len(example.strip().splitlines()) <= 16
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", example],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    lines = result.stdout.splitlines()
    assert lines[:2] == re.findall(r"# (1 b'hello'|peer 7 .*)", example)
    assert result.stderr == ""


def test_the_readme_is_one_page() -> None:
    assert len(README.read_text().splitlines()) <= 150


@pytest.mark.sampled(8)
@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem
)
def test_python(page: Path, socket_path: str, tmp_path: Path) -> None:
    for number, block in enumerate(blocks(page, "python")):
        path = f"{socket_path}{number}"
        program = PRELUDE.format(path=path) + placed(block, path, tmp_path)
        if "pytest_plugins" in block:
            (tmp_path / "test_example.py").write_text(block)
            program = "import pytest, sys; sys.exit(pytest.main(['-q', sys.argv[1]]))"
        if 'publish("sensor"' in program:
            program = program.replace('"sensor"', '"another"')
        with a_server(path):
            result = subprocess.run(
                [sys.executable, "-W", "error", "-c", program, tmp_path / "test_example.py"],
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
        assert result.returncode == 0, f"{block}\n{result.stderr}"
        assert result.stderr == "", block


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "toml")], ids=name_of)
def test_configurations_are_read(page: Path) -> None:
    for block in blocks(page, "toml"):
        if "[project.urls]" in block:
            continue  # of pyproject.toml: tests/integration/test_wheels.py puts it there
        if "[vm." in block:
            assert group_file.parse(block.encode(), page.name)
        elif "[forward." in block:
            assert forward_file.parse(block.encode(), page.name)
        else:
            here = re.sub(r'"(gid:)?kvm"', r'"\1root"', block)  # a group that is everywhere
            assert config_file.parse(here.encode(), page.name).regions


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "ini")], ids=name_of)
def test_units_are_read(page: Path) -> None:
    """The options that they give to `serve` are options of it."""
    for block in blocks(page, "ini"):
        unit = configparser.RawConfigParser(strict=False)
        unit.read_string(block)
        words = shlex.split(unit["Service"].get("Environment", ""))
        for options in [word.removeprefix("OPTIONS=") for word in words]:
            given = ["serve", *options.split()]
            main._parser(given).parse_args(given)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "xml")], ids=name_of)
def test_xml_is_read(page: Path) -> None:
    for block in blocks(page, "xml"):
        assert len(ElementTree.fromstring(f"<domain>{block}</domain>"))  # noqa: S314


@each_page
def test_what_is_on_no_index_is_not_installed_from_one(page: Path) -> None:
    """The package itself is on none: pip gets a path, or a name that is not ours."""
    assert not from_an_index(page.read_text())


def from_an_index(text: str) -> list[str]:
    """Each `pip install` or `pipx install` of this package by its name."""
    command = r"\bpipx? install\b(?: +-\S+)* +['\"]?ivshmem(?![\w/])"
    return re.findall(command, re.sub(r"\\\n\s*", " ", text))


def test_the_reader_of_installations_can_fail() -> None:
    for line in ("pip install ivshmem", "pip install 'ivshmem[record]'", "pipx install -q ivshmem"):
        assert from_an_index(line), line
    for line in (
        "pip install .",
        "pip install '.[record]'",
        "pip install ivshmem/",
        "pip install numpy",
    ):
        assert not from_an_index(line), line


# -- what exists ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    found = {}
    for name in main.SUBCOMMANDS:
        with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
            main._parser([name]).parse_args([name, "--help"])
        found[name] = said.getvalue()
    return found


@each_page
def test_options_exist(page: Path, helps: dict[str, str]) -> None:
    """Those in `serve --option`, also without `ivshmem` before it."""
    names = "|".join(main.SUBCOMMANDS)
    for name, rest in re.findall(rf"`(?:ivshmem )?({names}) (--[^`]*)`", page.read_text()):
        for option in re.findall(r"--[a-z-]+", rest):
            assert option in helps[name], f"{name} {option}"


@each_page
def test_targets_of_make_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (HOME / "Makefile").read_text(), re.M))
    text = "\n".join([*shell_lines(page), *re.findall(r"`make .*?`", page.read_text())])
    for target in re.findall(r"^`?make ([a-z-]+)", text, re.M):
        assert target in targets


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


SOURCE = HOME / "src/ivshmem"
ARCHITECTURE = (HOME / "ARCHITECTURE.md").read_text()


def test_files_of_the_architecture_exist() -> None:
    """Each `room/file.py: Class.function` names a file that has that function."""
    for path in set(re.findall(r"`([\w/]+\.pyx?)[`:]", ARCHITECTURE)):
        file = HOME / path if path.startswith("tests/") else SOURCE / path
        if not file.exists():
            (file,) = SOURCE.glob(f"*/{path}")
        for names in re.findall(rf"`{re.escape(path)}: ([\w.]+)`", ARCHITECTURE):
            for name in names.split("."):
                made = rf"\b(def|class) {name}\b|^{name} = "
                assert re.search(made, file.read_text(), re.MULTILINE), f"{path}: {name}"


EXPLANATIONS = [page for page in PAGES if page.parent.name == "explanation"]


@pytest.mark.parametrize("page", [HOME / "ARCHITECTURE.md", *EXPLANATIONS], ids=name_of)
def test_functions_that_are_explained_exist(page: Path) -> None:
    """Each `Class.function` is in a file that has both."""
    named = set(re.findall(r"`(?:[\w/.]+: )?([A-Z]\w+)\.(\w+)`", page.read_text()))
    for owner, name in named - {("RLock", "_is_owned")}:  # Python's
        homes = [text for text in sources() if re.search(rf"^(cdef )?class {owner}\b", text, re.M)]
        assert any(re.search(rf"\b{name}\b", text) for text in homes), f"{owner}.{name}"


@functools.cache
def sources() -> list[str]:
    return [file.read_text() for file in SOURCE.rglob("*.py*") if file.suffix in {".py", ".pyx"}]


@each_page
def test_what_a_page_names_exists(page: Path) -> None:
    """Files of the source and of the tests, and `::test_name`."""
    spans = set(re.findall(r"`([^`\n]+)`", page.read_text()))
    for span in spans:
        if path := re.fullmatch(r"((?:[\w-]+/)*[\w-]+\.pyx?)(?:[: ].*)?", span):
            places = [f"{home}{path[1]}" for home in ("", "src/ivshmem/", "src/ivshmem/*/")]
            places += [f"{home}{path[1]}" for home in ("tests/", "tests/*/", "bench/")]
            assert any(any(HOME.glob(place)) for place in places), span
        for name in re.findall(r"::(test_\w+|Test\w+)", span):
            assert re.search(rf"\b(def|class) {name}\b", all_tests()), span


def test_each_claim_about_security_names_the_file_of_its_test() -> None:
    """`::test` alone is in the file that the page named before it."""
    page = (HOME / "SECURITY.md").read_text()
    file, found = "", 0
    for path, name in re.findall(r"`([\w/]+\.py)?(?:::(test_\w+|Test\w+)(?:\[[^]`]+\])?)?`", page):
        file = path or file
        if name:
            home = HOME / "tests" / (file if "/" in file else f"integration/{file}")
            assert re.search(rf"\b(def|class) {name}\b", home.read_text()), f"{file}: {name}"
            found += 1
    assert found > 40


@functools.cache
def all_tests() -> str:
    return "\n".join(file.read_text() for file in (HOME / "tests").rglob("test_*.py"))


# -- what is complete -----------------------------------------------------------------------------


@pytest.mark.parametrize("index", sorted((HOME / "docs").glob("*/index.md")), ids=name_of)
def test_an_index_links_to_each_of_its_pages(index: Path) -> None:
    links = re.findall(r"^- \[.+\]\(([\w-]+)\.md\): ", index.read_text(), re.M)
    assert sorted(links) == sorted(p.stem for p in index.parent.glob("*.md") if p != index)


def test_every_module_is_in_the_architecture() -> None:
    """Each room has a paragraph that names its modules, a subcommand's excepted."""
    listed = dict(re.findall(r"^\*\*(\w+)/\*\*:? (.*?)\n\n", ARCHITECTURE, re.DOTALL | re.M))
    rooms = {file.parent.name for file in SOURCE.glob("*/__init__.py")}
    assert set(listed) == rooms
    for room, text in listed.items():
        files = [*SOURCE.glob(f"{room}/*.py"), *SOURCE.glob(f"{room}/*.pyx")]
        known = {name for name, _ in main.SUBCOMMANDS.values()} if room == "cli" else set()
        modules = {file.stem for file in files} - {"__init__"} - known
        named = set(re.findall(r"`(\w+)`", text))
        if room != "bench":
            assert modules <= named, f"{room}: {sorted(modules - named)}"
        assert named <= modules | known, f"{room}: {sorted(named - modules)}"


def test_every_subcommand_has_its_help() -> None:
    page = (HOME / "docs/reference/command-line.md").read_text()
    assert set(re.findall(r"^## ivshmem (\w+)$", page, re.M)) == set(main.SUBCOMMANDS)
    for name in main.SUBCOMMANDS:
        assert f"```{{help-of}} {name}\n" in page
    of_guest = [name for name, *_ in guest_commands._COMMANDS]
    assert re.findall(r"^```\{help-of\} guest (\w+)$", page, re.M) == of_guest


def test_figures_that_are_quoted_were_measured() -> None:
    page = (HOME / "docs/howto/which-transport.md").read_text()
    measured = (HOME / "bench/README.md").read_text()
    rows = re.findall(r"^\| (.+) \| ([\d.]+) \|$", page, re.M)
    assert len(rows) == 10
    for what, ratio in rows:
        assert re.search(rf"^\| {re.escape(what)} \|.* {re.escape(ratio)} \|", measured, re.M), what


def test_every_record_is_listed() -> None:
    page = (HOME / "docs/reference/file-formats.md").read_text()
    listed = re.findall(r'^\| `\[(?:0, )?"(\w+)"', page, re.M)
    assert listed == [*records.MEMBER_KINDS, *records.SERVICE_KINDS]


def test_every_command_of_connect_is_listed() -> None:
    page = (HOME / "docs/reference/command-line.md").read_text()
    table = page[page.index("### Commands of `ivshmem connect`") : page.index("## ivshmem guest")]
    rows = re.findall(r"^\| (`.*?) \|", table, re.M)
    listed = {word for row in rows for word in re.findall(r"`(\w+)", row)}
    commands = {name[3:] for name in dir(shell.ClientShell) if name.startswith("do_")}
    assert listed == commands - {"EOF", "exit", "q"}


def test_every_setting_is_listed() -> None:
    page = (HOME / "docs/reference/configuration.md").read_text()
    for key in (*RegionConfig._fields, *config_values.SERVICE):
        assert f"`{key}`" in page
    assert set(config_values.SERVICE) <= set(ServiceConfig._fields)


def test_every_log_event_is_listed() -> None:
    page = (HOME / "docs/reference/log-events.md").read_text()
    listed = set(re.findall(r"^\| `(\w+)`", page, re.M))
    used = set()
    for file in (HOME / "src/ivshmem").rglob("*.py"):
        used |= set(re.findall(r"log_events\.fields\(\s*\"(\w+)\"", file.read_text()))
    assert used
    assert used <= listed


def test_every_metric_is_listed() -> None:
    page = (HOME / "docs/reference/metrics.md").read_text()
    names = {*metrics._GAUGES, *metrics._PEER_GAUGES, "ivshmem_info"}
    names |= {f"ivshmem_{name}_total" for name in metrics._COUNTERS}
    assert set(re.findall(r"^\| `(ivshmem_\w+)`", page, re.M)) == names


def test_every_request_is_listed() -> None:
    page = (HOME / "docs/reference/control-protocol.md").read_text()
    for word in control_client.REPLIES:
        assert f'"do": "{word}"' in page
    assert control.default_path("/x") == "/x.control"


def test_every_public_name_is_in_the_reference() -> None:
    text = "\n".join(page.read_text() for page in (HOME / "docs/reference").glob("*.md"))
    for module in ("ivshmem", *(f"ivshmem.{name}" for name in PUBLIC)):
        for name in __import__(module, fromlist=["__all__"]).__all__:
            assert f"{module}.{name}" in text or hasattr(errors, name), f"{module}.{name}"


def test_the_page_errors_says_who_exports_which() -> None:
    doc = errors.__doc__ or ""
    tree, _, text = doc.partition("\n`ivshmem` exports")
    first, _, internal = text.partition("except ")
    internal = internal.partition(". These six")[0]
    # Depth, name and module of each class.
    rows = re.findall(r"^    ([ |]*)(?:\+-- )?(\w+)(?:(?: .*)? (ivshmem\.\w+)$)?", tree, re.M)
    names = [name for _, name, _ in rows]
    above = names[: names.index(re.findall(r"above (\w+)\.", first)[0])]
    assert set(above) == {name for name in ivshmem.__all__ if hasattr(errors, name)}
    exported: dict[str, set[str]] = {}
    module, depth = "", 0
    for indent, name, home in rows[len(above) :]:
        if home or len(indent) <= depth:
            module, depth = home, len(indent)
        if module:
            exported.setdefault(module, set()).add(name)
    excepted = set(re.findall(r"\w+", internal)) - {"and"}
    assert len(excepted) == 6
    for module, listed in exported.items():
        public = __import__(module, fromlist=["__all__"]).__all__
        assert listed - excepted == {name for name in public if hasattr(errors, name)}, module
    assert excepted < set().union(*exported.values())


# Parts of a class that the page of a class that it extends describes.
BASES = {
    "Client": "Endpoint",
    "GuestDevice": "Endpoint",
    "Broker": "Server",
    "AtomicU32": "Atomic",
    "AtomicU64": "Atomic",
}


def members_in_the_reference(name: str, module: str, text: str) -> set[str]:
    """What the reference says that a class has; "*" if it describes all."""
    found = set()
    block = re.search(
        rf"^\.\. auto(?:class|exception):: {module}\.{name}\b.*\n((?: +.*\n|\n)*)", text, re.M
    )
    if block:
        if members := re.search(r"^ +:members:(.*)", block[1], re.M):
            found |= {*re.findall(r"\w+", members[1])} or {"*"}
        found |= {*re.findall(r":: (?:[\w.]+\.)?(\w+)", block[1])}
    kind = getattr(__import__(module, fromlist=[name]), name)
    doc = inspect.getdoc(kind) or ""
    for attributes in re.findall(r"^(?:Attributes|Args):\n((?: +.*\n?|\n)*)", doc, re.M):
        for names in re.findall(r"^    ([a-z_0-9, ]+):", attributes, re.M):
            found |= {*re.findall(r"\w+", names)}
    found |= {*re.findall(r"`(\w+)`", doc)}
    found |= {*getattr(kind, "__match_args__", ()), *getattr(kind, "_fields", ())}
    return found


def test_every_public_member_is_in_the_reference() -> None:
    text = "\n".join(page.read_text() for page in (HOME / "docs/reference").glob("*.md"))
    listing = (HOME / "tests/unit/public_names.txt").read_text()
    modules = re.findall(r"^\[(.*)\]\n((?:.+\n)+)", listing, re.M)
    homes = {
        name: module
        for module, names in modules
        for name in re.findall(r"^class (\w+)", names, re.M)
    }
    missing = []
    for _, names in modules:
        for name, members in re.findall(r"^class (\w+).*\n((?:    .*\n)*)", names, re.M):
            described = members_in_the_reference(name, homes[name], text)
            if base := BASES.get(name):
                described |= members_in_the_reference(base, homes[base], text)
            each = re.findall(r"^    \.(\w+)", members, re.M)
            missing += [f"{name}.{one}" for one in each if not described & {one, "*"}]
    assert not missing


def test_the_names_in_the_changelog_exist() -> None:
    """Each new spelling in the table is a public name, or a module for `cimport`."""
    changelog = (HOME / "CHANGELOG.md").read_text()
    rows = re.findall(r"^\| `.*\| (.+) \|$", changelog, re.M)
    assert len(rows) > 20
    known = set(re.findall(r"[A-Za-z_]\w*", (HOME / "tests/unit/public_names.txt").read_text()))
    for row in rows:
        spans = re.findall(r"`(.*?)`", row)
        assert spans or row.startswith(("internal", "TypeError", "TimeoutError", "returns "))
        modules = re.findall(r"`(?:from )?(?:ivshmem\.)?(native\.\w+|_core)\b", row)
        for module in modules:
            assert (SOURCE / f"{module.replace('.', '/')}.pxd").exists(), row
        for span in [] if modules else spans:
            names = set(re.findall(r"[A-Za-z_]\w*", span))
            assert names <= known, f"{row}: {names - known}"
