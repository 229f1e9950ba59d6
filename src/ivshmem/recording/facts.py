"""Internal: what a channel's facts are in MCAP, and what a topic of MCAP is as a channel.

Knows: schemas, encodings and metadata; which names channels can have. Does not know: files,
regions.

    a channel                      in MCAP
    name                           topic
    dtype and shape                schema "array <f4 2x3", encoding x-ivshmem-array, its data JSON:
                                   {"dtype": "<f4", "shape": [2, 3]}; message encoding the same
    schema WORDS                   schema WORDS without encoding and data
    kind, limit, slots, ..         metadata of the MCAP channel, each with the prefix "ivshmem."
    position of a message          sequence, modulo 2**32: a gap is what was lost

A file is a stranger's: numbers are checked here, and again by what creates the channel.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..channel import records, types
from ..channel.geometry import MOST
from ..errors import ChannelTypeError
from ..text import plain

ENCODING = "x-ivshmem-array"
KINDS = ("messages", "value")  # which can be recorded
_PREFIX = "ivshmem."
_NUMBERS = ("limit", "slots", "writers", "readers", "loans", "views")
_OPTIONS = ("times", "ring_always")
_SCHEMA = "schema "  # begins the type of a channel with a schema
_SMALL = 1 << 20  # bytes; of longer messages fewer are kept


@dataclass(frozen=True)
class Schema:
    """A schema as MCAP has it. `name` "": there is none."""

    name: str
    encoding: str
    data: bytes


@dataclass
class Topic:
    """What a file says of one of its channels, and what its messages show.

    Attributes:
        number, name: in the file.
        type: of a channel, as text in memory.
        facts: of a recorded channel; empty: another program recorded it.
        longest: bytes of the longest message; 0: not known.
        used: whether the file has a message of it, as far as is known.
    """

    number: int
    name: str
    type: str
    facts: dict[str, Any]
    longest: int = 0
    used: bool = False

    @property
    def limit(self) -> int:
        """Bytes that a message of its channel needs."""
        return max(int(self.facts.get("limit", 1)), self.longest, 1)

    @property
    def kind(self) -> str:
        return str(self.facts.get("kind", "messages"))


def schema_of(text: str) -> Schema:
    """Return the schema for a channel's type, which is any peer's to write."""
    if text.startswith(_SCHEMA):
        return Schema(plain(text.removeprefix(_SCHEMA)), "", b"")
    kind = types.parse(text)
    if kind is None:
        return Schema("", "", b"")
    shape = [-1 if length is None else length for length in kind.shape]
    data = json.dumps({"dtype": kind.dtype, "shape": shape}).encode()
    return Schema(kind.text, ENCODING, data)


def metadata_of(facts: Mapping[str, Any]) -> dict[str, str]:
    """Return a channel's facts (channel/records.pyx) as metadata."""
    found = {"kind": facts["kind"], "type": plain(facts["type"])}
    found.update({what: str(facts[what]) for what in _NUMBERS})
    found.update({what: "yes" if facts[what] else "no" for what in _OPTIONS})
    found["overflow"] = " ".join(facts["overflow"])
    return {f"{_PREFIX}{what}": text for what, text in found.items()}


def topic_of(
    number: int, name: str, schema: tuple[str, str] | None, metadata: Mapping[str, str]
) -> Topic:
    """Return what a file says of one of its channels.

    Args:
        schema: its name and encoding; None: there is none.
    """
    facts = _facts_of(metadata)
    if facts:
        return Topic(number, name, facts.pop("type"), facts)
    words = " ".join(part for part in schema or () if part)
    return Topic(number, name, _fitting(words), {})


def _facts_of(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the facts of a channel that we recorded; empty: it is not one, or makes no sense."""
    found: dict[str, Any] = {}
    try:
        found["kind"] = metadata[f"{_PREFIX}kind"]
        found["type"] = metadata[f"{_PREFIX}type"]
        for what in _NUMBERS:
            found[what] = int(metadata[f"{_PREFIX}{what}"])
        for what in _OPTIONS:
            found[what] = metadata[f"{_PREFIX}{what}"] == "yes"
        found["overflow"] = tuple(metadata[f"{_PREFIX}overflow"].split())
        types.parse(found["type"])
    except (KeyError, ValueError, ChannelTypeError):
        return {}
    sensible = (
        found["kind"] in KINDS
        and all(0 < found[what] <= MOST for what in _NUMBERS)
        and all(way in records.OVERFLOW for way in found["overflow"])
    )
    return found if sensible else {}


def _fitting(words: str) -> str:
    """Return a schema's type text, as long as one can be."""
    text = plain(words)
    while len(f"{_SCHEMA}{text}".encode()) > records.TYPE_BYTES:
        text = text[:-1]
    return f"{_SCHEMA}{text}" if text else ""


def geometry_of(topic: Topic, limit: int) -> dict[str, Any]:
    """Return the arguments that create the channel of a topic, beside its name and type."""
    facts = topic.facts
    if topic.kind == "value":
        return {
            "limit": limit,
            "readers": facts["readers"],
            "times": facts["times"],
            "ring_always": facts["ring_always"],
        }
    if not facts:
        slots = 16 if limit <= _SMALL else 4
        return {"limit": limit, "slots": slots, "writers": 1, "views": 1, "times": True}
    return {
        "limit": limit,
        **{what: facts[what] for what in ("slots", "writers", "readers", "views")},
        "loans": max(facts["loans"] - 1, 0),  # the record also counts the one for `put`
        "overflow": facts["overflow"],
        "times": facts["times"],
        "ring_always": facts["ring_always"],
    }


def type_arguments(text: str) -> dict[str, Any]:
    """Return the arguments of a creation, or of `open`, for a type as text."""
    kind = types.parse(text)
    if kind is None:
        return {"schema": text.removeprefix(_SCHEMA)}
    return {"dtype": _dtype(kind), "shape": kind.shape}


def _dtype(kind: types.ArrayType) -> Any:
    return kind.numpy() if ":" in kind.dtype else kind.dtype


def names_of(topics: Iterable[Topic]) -> dict[int, str]:
    """Return a name that a channel can have for each topic, by number.

    Topics of one name share a channel if they have one type; otherwise the later ones get a number.
    """
    names: dict[int, str] = {}
    taken: dict[str, Topic] = {}
    for topic in topics:
        name = _name_of(topic.name)
        there = taken.setdefault(name, topic)
        if (there.type, there.kind, there.name) != (topic.type, topic.kind, topic.name):
            name = _shortened(f"{name}~{topic.number}")
            taken.setdefault(name, topic)
        names[topic.number] = name
    return names


def _name_of(topic: str) -> str:
    """Return the name of a topic as a channel's: printable, and short enough."""
    visible = "".join(each if each.isprintable() else "_" for each in topic).strip()
    return _shortened(visible or "_")


def _shortened(name: str) -> str:
    if len(name.encode()) <= records.NAME_BYTES:
        return name
    mark = hashlib.blake2b(name.encode(), digest_size=4).hexdigest()
    while len(f"{name}~{mark}".encode()) > records.NAME_BYTES:
        name = name[:-1]
    return f"{name}~{mark}"
