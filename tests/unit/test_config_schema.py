"""The JSON Schema of configuration files agrees with the loader, as a validator sees it."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import jsonschema  # type: ignore[import-untyped, unused-ignore]
import pytest
from support.config_files import WRONG, A

import ivshmem
from ivshmem.cli.main import main
from ivshmem.config import ConfigError, parse
from ivshmem.memory.sizes import parse_size
from ivshmem.service.config import RegionConfig
from ivshmem.service.config_file import read_toml
from ivshmem.service.config_schema import schema
from ivshmem.service.config_values import REGION, SERVICE

VALIDATOR = jsonschema.Draft7Validator(schema())

# Files that are wrong for a reason that a schema cannot know.
ONLY_THE_LOADER = {
    *("size", "channels", "hugepages"),  # powers of two, this machine
    *("owner", "group"),  # this machine's accounts
    # what one setting says to another
    *("readonly", "grow", "huge pages", "room for names", "room for channels"),
    *("one socket", "one name", "one memory", "control"),  # what one region says to another
}

GOOD = {
    "the least": A,
    "all": f"""
        [service]
        control = "/run/ivshmem/control"
        metrics = "[::1]:9400"
        log_format = "json"
        {A}
        size = "64M"
        vectors = 2048
        name = "/db"
        prealloc = true
        existing = "replace"
        keep = true
        names = 15
        channels = "1M"
        mode = "0660"
        owner = "root"
        group = 0
        allow = ["gid:0", "root", "all"]
        deny = ["process:evil"]
        readonly_for = ["uid:65534"]
        accept_owner = ["root", 0]
        peers_per_uid = 3
        joins_per_minute = 60
        hold_leaves = true
        """,
    "a file": f'{A}file = "/x/y"\nsize = 4096\nreadonly = true\nexisting = "require"',
    "a directory": f'{A}directory = "/x"\nsize = " 0.5 G"\n',
    "hexadecimal": f'{A}size = "0x100000"\nnames = true\nmode = "0o660"',
    "a port": f"{A}[service]\nmetrics = 0",
    "a host": f'{A}[service]\nmetrics = "node-7.example.org:9400"',
    "several": "".join(f'[region.r-{i}]\nsocket = "/x/{i}"\n' for i in range(3)),
}


def loads(text: str | bytes) -> bool:
    try:
        parse(text.encode() if isinstance(text, str) else text, "x.toml")
    except ConfigError:
        return False
    return True


def tables(text: str | bytes) -> Any:
    return read_toml(text.encode() if isinstance(text, str) else text, "x.toml")


def test_it_is_a_schema() -> None:
    jsonschema.Draft7Validator.check_schema(schema())


def test_each_setting_is_in_it() -> None:
    (region,) = schema()["properties"]["region"]["patternProperties"].values()
    assert list(region["properties"]) == list(RegionConfig._fields) == list(REGION)
    assert list(schema()["properties"]["service"]["properties"]) == list(SERVICE)
    for each in (*REGION.values(), *SERVICE.values()):
        assert each.text[0].islower() or each.text.startswith("POSIX")


@pytest.mark.parametrize("text", GOOD.values(), ids=list(GOOD))
def test_good(text: str) -> None:
    assert loads(text)
    VALIDATOR.validate(tables(text))


@pytest.mark.parametrize("name", WRONG)
def test_wrong(name: str) -> None:
    text, _ = WRONG[name]
    assert not loads(text)
    try:
        found = tables(text)
    except ConfigError:
        return  # not TOML: nothing that a schema could look at
    if name == "hexadecimal":
        return  # the validator cannot print a number of so many digits
    assert VALIDATOR.is_valid(found) == (name in ONLY_THE_LOADER)


VALUES: list[Any] = [
    *(True, False, 0, 1, -1, 3, 4096, 5000, 65535, 65536, 1 << 31, (1 << 31) + 1, 1 << 62, 1.5),
    *("", "x", "/x", "/x/y", "a/b", "4M", "4X", "-1", ".5G", "0660", "9", "json", "attach", "2M"),
    *("127.0.0.1:9400", ":80", "::1:80", "[::1]:80", "root", "all", "/" + "x" * 107),
    *([], [0], ["root"], ["all"], ["uid:0"], ["uid:"], ["x"], [True], [["root"]], {}),
]


@pytest.mark.parametrize("key", [*REGION, *(f"service.{key}" for key in SERVICE)])
def test_no_value_that_loads_is_refused(key: str) -> None:
    """For each setting, what the loader takes the schema takes; the table has both kinds."""
    loaded = refused = 0
    for value in VALUES:
        service, _, name = key.rpartition(".")
        region = {"socket": "/s", **({} if service else {name: value})}
        found = {"region": {"a": region}, **({"service": {name: value}} if service else {})}
        settings = SERVICE if service else REGION
        try:
            settings[name].check(value)
            loaded += 1
        except (ValueError, OverflowError, OSError):
            refused += not VALIDATOR.is_valid(found)
            continue
        assert VALIDATOR.is_valid(found), value
    assert loaded
    assert refused


@pytest.mark.parametrize("key", ["size", "hugepages"])
def test_a_text_is_a_size_for_both(key: str) -> None:
    sizes = [" 0x1000 ", "4096", ".5G", "1.G", "64 KiB", "2mb", "1e", "3B"]
    others = ["text", "127.0.0.1:9400", "0o660", "1..5G", "4X", "4Kb i", "-1", "", "0x", "4 K M"]
    for text in sizes + others:
        found = {"region": {"a": {"socket": "/s", key: text}}}
        assert VALIDATOR.is_valid(found) == (text in sizes), text
        with contextlib.nullcontext() if text in sizes else pytest.raises(ivshmem.RegionError):
            parse_size(text)


@pytest.mark.parametrize(
    ("key", "expected"),
    {
        "owner": "a name or a number",
        "accept_owner": "a list of users",
        "hugepages": "true, false, or a size",
        "service.metrics": r"\[HOST:\]PORT",
    }.items(),
)
def test_a_number_with_a_fraction(key: str, expected: str) -> None:
    service, _, name = key.rpartition(".")
    with pytest.raises(ValueError, match=f"expected {expected}"):
        (SERVICE if service else REGION)[name].check(1.0)


def test_it_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--print-schema"]) == 0
    assert json.loads(capsys.readouterr().out) == schema()
