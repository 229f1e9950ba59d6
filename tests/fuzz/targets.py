"""All targets, by name."""

from __future__ import annotations

from collections.abc import Mapping

from .client import ClientTarget
from .config import ConfigTarget
from .control import ControlTarget
from .directory import DirectoryTarget
from .server import ServerTarget
from .target import Target

TARGETS: Mapping[str, type[Target]] = {
    target.name: target
    for target in (ClientTarget, ServerTarget, DirectoryTarget, ControlTarget, ConfigTarget)
}
