"""All targets, by name."""

from __future__ import annotations

from collections.abc import Mapping

from .channel import ChannelTarget
from .client import ClientTarget
from .config import ConfigTarget
from .control import ControlTarget
from .directory import DirectoryTarget
from .header import HeaderTarget
from .server import ServerTarget
from .target import Target

TARGETS: Mapping[str, type[Target]] = {
    target.name: target
    for target in (
        ClientTarget,
        ServerTarget,
        DirectoryTarget,
        ControlTarget,
        ConfigTarget,
        ChannelTarget,
        HeaderTarget,
    )
}
