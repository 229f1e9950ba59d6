"""The configuration of a service: regions, each with a socket, memory and access rules.

Knows: the settings, what they contradict, which of them can change. Does not know: how they are
written (config_file.py and the command line do), how anything is opened.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType

from ..errors import ConfigError
from ..memory.pages import huge_page_size
from ..memory.region import posix_path
from ..memory.sizes import check_size, format_size, parse_size
from ..peer.limits import SLOT_BYTES
from ..server.access import Rules
from ..system.named_tuple import NamedTuple
from .limits import DEFAULT_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class RegionConfig(NamedTuple):
    """One region: its socket, its memory, and who may have it.

    Attributes:
        socket: path.
        size: text or bytes; None: the default, or what an existing name or file has.
        vectors: of each peer.
        name, file, directory: where the memory is, at most one of them; see Region.create.
        hugepages: True, or the size of a huge page.
        prealloc: allocate all pages at start.
        existing: what to do with a name or file that exists: one of EXISTING.
        readonly: attach for reading only.
        accept_owner: other users whose name or file is accepted; see Region.attach.
        keep: do not remove the name at the end, even if this server made it.
        names: slots in a directory of names; 0: the usual number; None: no directory.
        channels: bytes set aside for channels, which need a directory of names; None: none.
        mode, owner, group: of the socket; see Listener.
        allow, deny, readonly_for, peers_per_uid, joins_per_minute: see Rules.
        hold_leaves: never tell QEMU that a peer left, so that its device can be unplugged.
    """

    socket: str
    size: int | str | None = None
    vectors: int = 1
    name: str | None = None
    file: str | None = None
    directory: str | None = None
    hugepages: bool | str = False
    prealloc: bool = False
    existing: str = "attach"
    readonly: bool = False
    accept_owner: tuple[str, ...] = ()
    keep: bool = False
    names: int | None = None
    channels: int | None = None
    mode: int | None = None
    owner: int | str | None = None
    group: int | str | None = None
    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()
    readonly_for: tuple[str, ...] = ()
    peers_per_uid: int | None = None
    joins_per_minute: int | None = None
    hold_leaves: bool = False

    def rules(self) -> Rules:
        """Return new Rules from these settings. They count joins, so each server needs its own."""
        return Rules(
            self.allow,
            self.deny,
            self.readonly_for,
            self.peers_per_uid,
            self.joins_per_minute,
        )

    @property
    def has_directory(self) -> bool:
        """Whether the region has a directory of names, which also says where channels are."""
        return self.names is not None or self.channels is not None

    @property
    def restricts(self) -> bool:
        """Whether there is any rule or limit."""
        return self.rules() != Rules()


RULES = frozenset({"allow", "deny", "readonly_for", "peers_per_uid", "joins_per_minute"})

# What a region that is served can have changed without its peers noticing.
CHANGEABLE = RULES | {"mode", "owner", "group", "accept_owner", "keep", "hold_leaves"}


class ServiceConfig(NamedTuple):
    """Regions by name, and the settings of the whole service.

    Attributes:
        control: path of the control socket; None: the caller decides.
        metrics: "HOST:PORT" or "PORT"; None: no metrics.
        log_format: one of LOG_FORMATS.
        source: the file that the configuration was read from; None: there is none.
    """

    regions: Mapping[str, RegionConfig] = MappingProxyType({})
    control: str | None = None
    metrics: str | None = None
    log_format: str = "text"
    source: str | None = None

    def error(self, text: str) -> ConfigError:
        """Return a ConfigError with this text, and the file in front."""
        return ConfigError(text if self.source is None else f"{self.source}: {text}")

    def _to_json(self) -> dict[str, Any]:
        """Return all settings as a dict that JSON can hold."""
        regions = {name: region._asdict() for name, region in self.regions.items()}
        return {**self._asdict(), "regions": regions}

    @classmethod
    def _from_json(cls, values: Mapping[str, Any]) -> ServiceConfig:
        """Return the configuration that `_to_json` gave, also in an older or a newer version.

        Settings that this version does not know are dropped.
        """
        known = {key: values[key] for key in cls._fields if key in values}
        regions = {name: from_json(each) for name, each in known.pop("regions").items()}
        return cls(regions, **known)


def problems(region: RegionConfig) -> list[str]:
    """Return the contradictions in a region's settings, each as the rest of a sentence."""
    found = []
    given = [key for key in ("name", "file", "directory") if getattr(region, key) is not None]
    if len(given) > 1:
        found.append(f": {' and '.join(given)} exclude each other")
    lasting = {"name", "file"}.intersection(given)
    if (region.readonly or region.existing == "require") and not lasting:
        found.append(": only a name or a file can be attached to: give one")
    if region.existing == "grow" and region.name is None:
        found.append('.existing = "grow": only a name can grow: give one')
    size = parse_size(DEFAULT_SIZE if region.size is None else region.size)
    if region.hugepages and not given:
        try:
            check_size(size, huge_page_size(region.hugepages), what="memory in huge pages")
        except ValueError as error:
            found.append(f'.size = "{format_size(size)}": {error}')
    taken = ((region.names or 0) + 1) * SLOT_BYTES
    if (region.size is not None or not lasting) and taken > size:
        found.append(
            f".names = {region.names}: they take {taken} bytes, and the region has"
            f" {format_size(size)}"
        )
    elif region.channels is not None and (region.size is not None or not lasting):
        from ..peer.channel_area import place_of  # here: few regions have channels
        from ..peer.names_table import default_slots

        try:
            place_of(size, region.names or default_slots(size), region.channels)
        except ValueError as error:
            found.append(f'.channels = "{format_size(region.channels)}": {error}')
    return found


def places(region: RegionConfig) -> dict[str, str]:
    """Return the paths that no other region can have, by their keys."""
    found = {"socket": region.socket, "file": region.file}
    if region.name is not None:
        found["name"] = posix_path(region.name)
    return {key: os.path.realpath(path) for key, path in found.items() if path is not None}


def conflicts(config: ServiceConfig) -> list[str]:
    """Return which paths two regions, or a region and the service, would both use."""
    found = []
    taken = {} if config.control is None else {os.path.realpath(config.control): "service.control"}
    for name, region in config.regions.items():
        for key, path in places(region).items():
            if path in taken:
                found.append(
                    f'region.{name}.{key} = "{getattr(region, key)}": {taken[path]} is the same'
                )
            taken.setdefault(path, f"region.{name}.{key}")
    return found


def from_json(values: Mapping[str, Any]) -> RegionConfig:
    """Return a region's settings from the dict that `_asdict` and JSON made of them.

    Settings that this version does not know are dropped.
    """
    known = {key: values[key] for key in RegionConfig._fields if key in values}
    lists = {key: tuple(value) for key, value in known.items() if isinstance(value, list)}
    return RegionConfig(**known | lists)
