"""What is to be done so that another configuration is served, and what cannot be.

Knows: which settings can change while a region is served. Does not know: how it is done.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..memory.sizes import format_size, parse_size
from ..system.named_tuple import NamedTuple
from .config import CHANGEABLE, RegionConfig, ServiceConfig, conflicts, places

_OF_THE_SERVICE = ("control", "metrics", "log_format")


class Changes(NamedTuple):
    """What is to be done.

    Attributes:
        added: regions to open.
        removed: names of those to close.
        altered: which settings change of a region that stays.
    """

    added: Mapping[str, RegionConfig]
    removed: tuple[str, ...]
    altered: Mapping[str, frozenset[str]]

    def lines(self) -> list[str]:
        """One for each region that is not as it was."""
        return [
            *(
                f"region {name}: {', '.join(sorted(keys))} changed"
                for name, keys in self.altered.items()
            ),
            *(f"region {name}: removed" for name in self.removed),
            *(f"region {name}: added" for name in self.added),
        ]


def plan(old: ServiceConfig, served: Mapping[str, RegionConfig], new: ServiceConfig) -> Changes:
    """What leads from one configuration to another.

    Args:
        served: of `old`, the regions that are being served, with the sizes that they have.

    Raises:
        ConfigError: the new one contradicts itself, or would change what cannot change.
    """
    if found := conflicts(new):
        raise new.error("; ".join(found))
    for key in _OF_THE_SERVICE:
        before, after = getattr(old, key), getattr(new, key)
        if before != after:
            # The control socket is where a successor finds who is to be taken over from.
            way = (
                "leave it, or end this server, which cuts its peers off"
                if key == "control"
                else "restart with --takeover, which no peer notices"
            )
            raise new.error(
                f"service.{key} = {_shown(after)}: it cannot change from {_shown(before)} while it"
                f" is in use: {way}"
            )
    altered = {}
    for name in new.regions.keys() & served.keys():
        altered[name] = _differences(served[name], new.regions[name])
        for key in sorted(altered[name] - CHANGEABLE):
            before, after = getattr(served[name], key), getattr(new.regions[name], key)
            raise new.error(
                f"region.{name}.{key} = {_shown(after, key)}: it cannot change from"
                f" {_shown(before, key)}"
                " while the region is served: give the new one another name and socket, or remove"
                " this one, reload, and add it again"
            )
    removed = tuple(name for name in served if name not in new.regions)
    added = {name: region for name, region in new.regions.items() if name not in served}
    _check_places(new, {name: served[name] for name in removed}, added)
    order = [name for name in new.regions if altered.get(name)]
    return Changes(added, removed, {name: altered[name] for name in order})


def _differences(served: RegionConfig, new: RegionConfig) -> frozenset[str]:
    """The settings of a region that are others now."""
    keys = {
        key
        for key, before, after in zip(RegionConfig._fields, served, new, strict=True)
        if before != after
    }
    if new.size is None or parse_size(new.size) == served.size:
        keys.discard("size")
    return frozenset(keys)


def _check_places(
    new: ServiceConfig, removed: Mapping[str, RegionConfig], added: Mapping[str, RegionConfig]
) -> None:
    """Refuse what is in use until a region is removed, which comes after the others are opened."""
    taken = {path: name for name, region in removed.items() for path in places(region).values()}
    for name, region in added.items():
        for key, path in places(region).items():
            if path in taken:
                raise new.error(
                    f"region.{name}.{key} = {_shown(getattr(region, key))}: region {taken[path]} is"
                    " served with it: remove that one, reload, and add this one then"
                )


def _shown(value: object, key: str = "") -> str:
    """A value as it stands in a file."""
    import json  # here: a server needs it only when it changes

    if isinstance(value, int) and key in ("size", "channels"):
        value = format_size(value)
    return "nothing" if value is None else json.dumps(value)
