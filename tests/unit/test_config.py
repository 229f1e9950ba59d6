"""What a configuration can be, and what is said of one that cannot be served."""

from __future__ import annotations

import builtins
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.config_files import WRONG, A

from ivshmem.config import ConfigError, RegionConfig, ServiceConfig, load
from ivshmem.server.access import Rules
from ivshmem.service.config import CHANGEABLE, conflicts, from_json, problems
from ivshmem.service.limits import EXISTING, LOG_FORMATS


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config") / "ivshmem.toml"


def loaded(file: Path, text: str | bytes) -> ServiceConfig:
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load(file)


def refusal(file: Path, text: str | bytes) -> str:
    """What is said of a file, less its name."""
    with pytest.raises(ConfigError) as caught:
        loaded(file, text)
    said = str(caught.value)
    assert said.startswith(f"{file}: ")
    assert said.isprintable(), "it is one line"
    assert len(said) < 4000
    return said.removeprefix(f"{file}: ")


# -- what is there --------------------------------------------------------------------------------


def test_everything(file: Path) -> None:
    config = loaded(
        file,
        """
        [service]
        control = "/run/ivshmem/control"
        metrics = 9400
        log_format = "json"

        [region.db]
        socket = "/run/ivshmem/db"
        size = "64M"
        vectors = 4
        name = "db"
        prealloc = true
        existing = "replace"
        keep = true
        names = 15
        channels = "1M"
        mode = "0660"
        owner = "root"
        group = 0
        allow = ["gid:0", "root"]
        deny = ["process:evil"]
        readonly_for = ["uid:65534"]
        peers_per_uid = 3
        joins_per_minute = 60

        [region.logs-2]
        socket = "/run/ivshmem/logs"
        size = 4096
        names = true
        """,
    )
    assert config == ServiceConfig(
        {
            "db": RegionConfig(
                "/run/ivshmem/db",
                size=64 << 20,
                vectors=4,
                name="db",
                prealloc=True,
                existing="replace",
                keep=True,
                names=15,
                channels=1 << 20,
                mode=0o660,
                owner="root",
                group=0,
                allow=("gid:0", "root"),
                deny=("process:evil",),
                readonly_for=("uid:65534",),
                peers_per_uid=3,
                joins_per_minute=60,
            ),
            "logs-2": RegionConfig("/run/ivshmem/logs", size=4096, names=0),
        },
        control="/run/ivshmem/control",
        metrics="9400",
        log_format="json",
        source=str(file),
    )
    rules = config.regions["db"].rules()
    assert rules == Rules(["gid:0", "root"], ["process:evil"], ["uid:65534"], 3, 60)
    assert config.regions["db"].restricts
    assert not config.regions["logs-2"].restricts


def test_it_cannot_be_changed(file: Path) -> None:
    config = loaded(file, A)
    with pytest.raises(AttributeError):
        config.regions["a"].size = 1  # type: ignore[misc]
    assert config != loaded(file, A + "vectors = 2")
    assert config == loaded(file, A + "vectors = 1")


@pytest.mark.parametrize("mode", ["660", "0660", "0o660"])
def test_modes(file: Path, mode: str) -> None:
    assert loaded(file, f'{A}mode = "{mode}"').regions["a"].mode == 0o660


# -- what is wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=list(WRONG))
def test_wrong(file: Path, text: str | bytes, message: str) -> None:
    assert message in refusal(file, text)


def test_all_errors_are_found_and_the_first_are_told(file: Path) -> None:
    text = "\n".join(f'[region.r{i}]\nsocket = "r{i}"\nvectors = -{i + 1}' for i in range(20))
    said = refusal(file, text).split("; ")
    assert [line.partition(" = ")[0] for line in said] == [
        "region.r0.socket",
        "region.r0.vectors",
        "region.r1.socket",
        "region.r1.vectors",
        "region.r2.socket",
    ]
    assert said[-1].endswith("an absolute path (and 35 more)")


def test_a_link_to_the_same_socket(file: Path) -> None:
    link = file.parent / "link"
    link.symlink_to(file.parent)
    text = f'[region.a]\nsocket = "{file.parent}/s"\n[region.b]\nsocket = "{link}/s"'
    assert "region.a.socket is the same" in refusal(file, text)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        load(tmp_path / "none")
    assert caught.value.filename == str(tmp_path / "none")


def test_without_a_reader_of_toml(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Python 3.10 without the extra."""
    real = builtins.__import__

    def fail(name: str, *rest: Any) -> Any:
        if name in ("tomllib", "tomli"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(ConfigError, match=r"pip install tomli"):
        load(file)


def test_what_cannot_be_read_is_an_oserror(file: Path) -> None:
    with pytest.raises(IsADirectoryError):
        load(file.parent)


def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(ConfigError, match="fifo: it is a FIFO, not a regular file"):
        load(fifo)


# -- round trips ----------------------------------------------------------------------------------

texts = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S"]), min_size=1)
paths = texts.map(lambda text: f"/{text}").filter(lambda path: len(os.fsencode(path)) <= 107)
counts = st.none() | st.integers(1, 1 << 31)
rules = st.lists(st.sampled_from(["all", "root", "uid:5", "gid:7", "process:q"])).map(tuple)
accounts = st.none() | st.integers(0, (1 << 32) - 2) | st.just("root")
# By `partial`, since hypothesis would make up all fields of a tuple, also those that have defaults.
regions = st.builds(
    partial(RegionConfig),
    paths,
    size=st.none() | st.integers(20, 62).map(lambda bit: 1 << bit),
    vectors=st.integers(0, 2048),
    name=st.none() | texts.filter(lambda t: "/" not in t and len(t) < 64 and t not in (".", "..")),
    prealloc=st.booleans(),
    existing=st.sampled_from(["attach", "refuse", "replace"]),
    keep=st.booleans(),
    names=st.none() | st.integers(0, 4095),
    channels=st.none() | st.integers(16384, 1 << 22),
    mode=st.none() | st.integers(0, 0o777),
    owner=accounts,
    group=accounts,
    allow=rules,
    deny=rules,
    readonly_for=rules,
    peers_per_uid=counts,
    joins_per_minute=counts,
)
configs = st.builds(
    partial(ServiceConfig),
    st.dictionaries(
        st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True), regions, min_size=1, max_size=3
    ),
    control=st.none() | paths,
    metrics=st.none() | st.integers(0, 65535).map(str),
    log_format=st.sampled_from(LOG_FORMATS),
)


def written(config: ServiceConfig) -> str:
    """A configuration as a person would write it."""
    values = {k: v for k, v in config._to_json().items() if k != "regions" and v is not None}
    lines = [
        "[service]",
        *(f"{k} = {json.dumps(v, ensure_ascii=False)}" for k, v in values.items()),
    ]
    for name, region in config._to_json()["regions"].items():
        lines.append(f"[region.{name}]")
        for key, value in region.items():
            if key == "mode" and value is not None:
                lines.append(f'mode = "{value:o}"')
            elif value is not None:
                lines.append(f"{key} = {json.dumps(value, ensure_ascii=False)}")
    return "\n".join(lines)


@settings(max_examples=settings().max_examples // 3)  # each is slow to make
@given(configs)
def test_from_a_file(file: Path, config: ServiceConfig) -> None:
    assume(not conflicts(config) and not any(map(problems, config.regions.values())))
    assert loaded(file, written(config)) == config._replace(source=str(file))


@given(configs)
def test_by_json(config: ServiceConfig) -> None:
    there = json.loads(json.dumps(config._to_json()))
    assert ServiceConfig._from_json(there) == config
    for name, region in config.regions.items():
        assert from_json(there["regions"][name]) == region


def test_json_of_another_version(file: Path) -> None:
    there = ServiceConfig({"a": RegionConfig("/a")})._to_json()
    there["new"] = there["regions"]["a"]["newer"] = 1
    del there["log_format"], there["regions"]["a"]["keep"]
    assert ServiceConfig._from_json(there) == ServiceConfig({"a": RegionConfig("/a")})


def test_what_can_change_is_there() -> None:
    assert set(RegionConfig._fields) > CHANGEABLE
    assert "attach" in EXISTING


# -- hostile files --------------------------------------------------------------------------------

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["/a", "4M", "3M", "root", "all", "uid:x", "attach", 5, 1 << 70]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=4,
)
KEYS = list(RegionConfig._fields)
tables = st.dictionaries(st.sampled_from(KEYS) | st.text(), values, max_size=6)


def toml(value: object) -> str:
    if isinstance(value, dict):
        inner = (f"{toml(str(k))} = {toml(v)}" for k, v in value.items() if v is not None)
        return "{" + ", ".join(inner) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(toml(each) for each in value if each is not None) + "]"
    if isinstance(value, str):
        return '"' + "".join(f"\\U{ord(c):08x}" for c in value) + '"'
    return str(value).lower()


def survives(file: Path, data: bytes) -> None:
    """It is loaded, or refused in one line."""
    file.write_bytes(data)
    said = ""
    try:
        load(file)
    except ConfigError as error:
        said = str(error)
    assert not said or said.isprintable()
    assert len(said) < 4000


@given(
    st.dictionaries(st.sampled_from(["service", "region"]) | st.text(), values | tables, max_size=3)
)
def test_any_values(file: Path, values: dict[str, object]) -> None:
    survives(file, "\n".join(f"{toml(k)} = {toml(v)}" for k, v in values.items()).encode())


@given(st.dictionaries(st.text("ab-.\0\n", max_size=3), tables, max_size=3))
def test_any_settings(file: Path, named: dict[str, dict[str, object]]) -> None:
    survives(file, f"region = {toml(named)}".encode())


@given(st.binary())
def test_any_bytes(file: Path, data: bytes) -> None:
    survives(file, data)


@given(configs, st.data())
def test_damaged(file: Path, config: ServiceConfig, data: st.DataObject) -> None:
    text = bytearray(written(config).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text)))
        text[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    survives(file, bytes(text))
