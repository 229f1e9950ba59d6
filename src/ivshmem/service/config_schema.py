"""A configuration file's JSON Schema, made of the table by which such files are checked.

Knows: JSON Schema of draft 7, which TOML language servers (taplo) understand. Does not know: what
a value may be; config_values.py does.
"""

from __future__ import annotations

from collections.abc import Mapping

from .config_values import NAME_OF_A_REGION, REGION, SERVICE, Setting

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def schema() -> dict[str, Any]:
    """Return the schema, in what JSON can hold."""
    region = {
        **_table(REGION),
        "required": ["socket"],
        "not": {
            "anyOf": [
                {"required": pair}
                for pair in (["name", "file"], ["name", "directory"], ["file", "directory"])
            ]
        },
    }
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "ivshmem serve --config FILE",
        "description": "The regions that a server serves, each with a socket and memory.",
        "type": "object",
        "properties": {
            "service": {"description": "what concerns all regions", **_table(SERVICE)},
            "region": {
                "description": "regions by name, at least one: [region.NAME]",
                "type": "object",
                "patternProperties": {f"^{NAME_OF_A_REGION}$": region},
                "additionalProperties": False,
                "minProperties": 1,
            },
        },
        "required": ["region"],
        "additionalProperties": False,
    }


def _table(settings: Mapping[str, Setting]) -> dict[str, Any]:
    properties = {key: {"description": each.text, **each.schema} for key, each in settings.items()}
    return {"type": "object", "properties": properties, "additionalProperties": False}
