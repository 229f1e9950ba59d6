"""Configuration files that anybody may have written."""

from __future__ import annotations

import json
from collections.abc import Sequence

from ivshmem import config as ivshmem_config
from ivshmem.config import ConfigError, ServiceConfig

from .target import Finding, Textual

_WHOLE = b"""\
[service]
control = "/run/ivshmem/control"
metrics = "127.0.0.1:9400"
log_format = "json"

[region.db]
socket = "/run/ivshmem/db"
size = "64M"
vectors = 4
name = "db"
existing = "grow"
keep = true
names = 63
channels = "1M"
mode = "0660"
owner = "root"
group = 0
allow = ["gid:0", "root", "uid:1000"]
deny = ["uid:33"]
readonly_for = ["uid:7"]
peers_per_uid = 3
joins_per_minute = 60

[region.huge]
socket = "/run/ivshmem/huge"
size = 2097152
directory = "/dev/hugepages"
hugepages = "2M"
prealloc = false

[region.file]
socket = "/run/ivshmem/file"
file = "/var/lib/ivshmem/file"
readonly = true
"""


class ConfigTarget(Textual):
    """What stands in configuration files."""

    name = "config"
    modules = (
        "service/config_file",
        "service/config",
        "server/access",
        "system/accounts",
        "memory/sizes",
        "memory/pages",
    )
    share = 8
    tokens = (
        *(b"true", b"false", b"0", b"-1", b"1e999", b"nan", b"9" * 30, b"9" * 5000, b"0x7f"),
        *(b"0o777", b'""', b'"\\u0000"', b'"\\n"', b'"\\U0010ffff"', b"[]", b"{}", b"[[", b"]]"),
        *(b"[region.a]\n", b"[[region]]\n", b"[service]\n", b"region = 1\n", b"a.b.c = 1\n"),
        *(b'socket = "/a"\n', b'"4M"', b'"1.5G"', b'"4Q"', b'"1e400"', b'"\xff"', b"\xc3\xa4"),
        *(b"1979-05-27", b"07:32:00", b"'''", b'"""', b"#", b"=", b".", b"\n", b'"', b"\\"),
        *(b'"uid:0"', b'"gid:root"', b'"uid:-1"', b'"uid:99999999999999999999"', b'"exe:/bin/sh"'),
        *(b'"[::1]:1"', b'"a:99999"', b'"../x"', b'"/' + b"x" * 200 + b'"', b"[" * 3000),
    )

    def seeds(self) -> Sequence[bytes]:
        tables = [b"[region.a]\n" + part for part in _WHOLE.split(b"\n\n")]
        return [_WHOLE, b"", *tables, b'[region.a]\nsocket = "/run/a"\n']

    def run(self, data: bytes) -> None:
        try:
            config = ivshmem_config.parse(data, "/etc/fuzz.toml")
        except ConfigError as error:
            text = str(error)
            if not text.startswith("/etc/fuzz.toml: ") or not text.isprintable():
                raise Finding(f"what it says is not one line: {text!r}") from error
            return
        again = ServiceConfig._from_json(json.loads(json.dumps(config._to_json())))
        if again != config:
            raise Finding(f"{config} became {again} by way of JSON")
