"""Asks a running server over its control socket.

The reference describes the protocol (docs/reference/control-protocol.md).
"""

from .errors import ControlError
from .service.control_client import ControlClient, default_path, request

__all__ = ["ControlClient", "ControlError", "default_path", "request"]
