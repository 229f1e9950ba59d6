"""Defaults and words of settings. They stand here so that a command line is read at once."""

from __future__ import annotations

DEFAULT_SIZE = "4M"
EXISTING = ("attach", "grow", "refuse", "replace", "require")
LOG_FORMATS = ("text", "json")
