"""Asks a running server over its control socket; service/control.py documents the protocol."""

from .errors import ControlError
from .service.control_client import ControlClient, default_path, request

__all__ = ["ControlClient", "ControlError", "default_path", "request"]
