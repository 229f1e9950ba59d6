"""Points of the C header of channels, each of which a copy of the header can do without.

`FILES` names the files that have points; places.h and records.h are not among them.

A point is a barrier, a fence, a comparison of an epoch, or one of `LOOKS`: a second look, or a
step that the protocol needs. `write_copy` writes a copy of the header in which each of them asks
IVSHMEM_HAS(number) first, so that one program (tests/channel/schedules.h) can run without any of
them. A load of the copy is IVSHMEM_GET, so that it can tell in which function it stands.

Knows: the text of the header. Does not know: which test shows that a point is needed.
Invariants: a barrier, a fence and a comparison of an epoch cannot be overlooked: they are found by
their form. A look is found by its text, which stands in its file once.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

FILES: Final = (
    "slots.h",
    "entries.h",
    "claims.h",
    "writer.h",
    "reader.h",
    "value.h",
    "queue.h",
    "calls.h",
    "bytes.h",
)
BARRIERS: Final = {
    "ivshmem_store_barrier": "store barrier",
    "ivshmem_load_barrier": "load barrier",
    "ivshmem_full_fence": "full fence",
    "ivshmem_announce": "announce",  # with a store barrier before the store
}


_LOADS: Final = re.compile(r"(?<!uint64_t )\b(ivshmem_(?:get|writer_owner|reader_owner))\(")


class Look(NamedTuple):
    """A condition or a call: `old` is replaced by `new`, in which HAS asks for the point."""

    name: str
    file: str
    old: str
    new: str


class Change(NamedTuple):
    begin: int
    end: int
    text: str  # HAS(n) is the point's
    what: str


LOOKS: Final = (
    Look(
        "the stamp before the entry",
        "entries.h",
        "if (message->stamp != ivshmem_word(position, 0, epoch))",
        "if (HAS && message->stamp != ivshmem_word(position, 0, epoch))",
    ),
    Look(
        "the stamp behind the entry",
        "entries.h",
        "if (ivshmem_get(channel, at) != message->stamp ||",
        "if ((HAS && ivshmem_get(channel, at) != message->stamp) ||",
    ),
    Look(
        "the cell's epoch",
        "entries.h",
        "((word ^ epoch) & 0xffffu) != 0",
        "(HAS && ((word ^ epoch) & 0xffffu) != 0)",
    ),
    Look(
        "the stamp behind the payload",
        "entries.h",
        "    return ((stamp ^ message->stamp) &",
        "    return !HAS || ((stamp ^ message->stamp) &",
    ),
    Look(
        "joins before each message",
        "writer.h",
        "ivshmem_get(writer->channel, IVSHMEM_JOINS) == writer->joins)",
        "(!HAS || ivshmem_get(writer->channel, IVSHMEM_JOINS) == writer->joins))",
    ),
    Look(
        "a writer looks again before it sleeps",
        "writer.h",
        "    code = ivshmem_writer_look(writer);\n    if (code != IVSHMEM_AGAIN)",
        "    code = HAS ? ivshmem_writer_look(writer) : IVSHMEM_AGAIN;\n"
        "    if (code != IVSHMEM_AGAIN)",
    ),
    Look(
        "a reader looks again before it sleeps",
        "reader.h",
        "        if (ivshmem_value(ivshmem_get(channel, ivshmem_source_head_at(reader, i))) !=\n"
        "            reader->sources[i].next) {",
        "        if (HAS &&\n"
        "            ivshmem_value(ivshmem_get(channel, ivshmem_source_head_at(reader, i))) !=\n"
        "            reader->sources[i].next) {",
    ),
    Look(
        "joins are counted",
        "reader.h",
        "    int code = ivshmem_reader_count(reader);\n",
        "    int code = HAS ? ivshmem_reader_count(reader) : 0;\n",
    ),
    Look(
        "a joining reader looks at the heads again",
        "reader.h",
        "uint64_t ahead = ivshmem_ahead(head, source->next);",
        "uint64_t ahead = HAS ? ivshmem_ahead(head, source->next) : 0;",
    ),
    Look(
        "a joining reader's margin of one",
        "reader.h",
        "if (ahead > most && !ivshmem_is_behind(head",
        "if (ahead > most + !HAS && !ivshmem_is_behind(head",
    ),
    Look(
        "a tail wakes writers",
        "reader.h",
        "    if (reader->overflow != IVSHMEM_BLOCK)\n        return;\n",
        "    if (!HAS || reader->overflow != IVSHMEM_BLOCK)\n        return;\n",
    ),
    Look(
        "a reader that leaves wakes writers",
        "reader.h",
        "reader->epoch));\n    ivshmem_wake_writers(",
        "reader->epoch));\n    if (HAS) ivshmem_wake_writers(",
    ),
    Look(
        "a former reader's cells come back",
        "writer.h",
        "    ivshmem_backlog_advance(writer, reader, tail);",
        "    if (HAS) ivshmem_backlog_advance(writer, reader, tail);",
    ),
    Look(
        "a former reader's entries are void",
        "writer.h",
        "    for (; position != tail;",
        "    for (; HAS && position != tail;",
    ),
    Look(
        "a value's entry stays as it is",
        "writer.h",
        "    if (!is_value)\n",
        "    if (!HAS || !is_value)\n",
    ),
    Look(
        "what is kept keeps its cell",
        "writer.h",
        "            is_used[adopted] = 1;",
        "            is_used[adopted] = HAS;",
    ),
    Look(
        "what is not kept is void",
        "writer.h",
        "            adopted = IVSHMEM_NO_CELL;\n            ivshmem_store(",
        "            adopted = IVSHMEM_NO_CELL;\n            if (HAS) ivshmem_store(",
    ),
    Look(
        "a new owner's claims are others",
        "queue.h",
        "ivshmem_claim_word(position, 0, IVSHMEM_CLAIM_OPEN, writer->epoch));",
        "ivshmem_claim_word(position, 0, IVSHMEM_CLAIM_OPEN, HAS ? writer->epoch : 0));",
    ),
    Look(
        "the owner is looked at again",
        "claims.h",
        "        return ivshmem_writer_owner(channel, writer) == owner &&\n",
        "        return (!HAS || ivshmem_writer_owner(channel, writer) == owner) &&\n",
    ),
    Look(
        "a value stays while its slot changes hands",
        "value.h",
        "        if (older != 0 && older <= IVSHMEM_EPOCH_MASK / 2 &&\n",
        "        if ((!HAS || (older != 0 && older <= IVSHMEM_EPOCH_MASK / 2)) &&\n",
    ),
    Look(
        "claims are exchanged",
        "queue.h",
        "    if (!ivshmem_claim_exchange(channel, taken->claim_at, claim, taken->claim))\n",
        "    if (!HAS)\n"
        "        ivshmem_store(\n"
        "            &channel->area.memory, channel->at + taken->claim_at, taken->claim);\n"
        "    else if (!ivshmem_claim_exchange(channel, taken->claim_at, claim, taken->claim))\n",
    ),
    Look(
        "no second server gets a call",
        "queue.h",
        "        channel->record.geometry.kind != IVSHMEM_QUEUE)",
        "        (HAS && channel->record.geometry.kind != IVSHMEM_QUEUE))",
    ),
    Look(
        "a reply is exchanged",
        "calls.h",
        "    if (!ivshmem_claim_exchange(channel, call->claim_at, call->claim,\n",
        "    if (!HAS)\n"
        "        ivshmem_store(&channel->area.memory, channel->at + call->claim_at,\n"
        "                      ivshmem_claim_word(position, server->slot, IVSHMEM_CLAIM_REPLIED,\n"
        "                                         server->epoch));\n"
        "    else if (!ivshmem_claim_exchange(channel, call->claim_at, call->claim,\n",
    ),
    Look(
        "a reply wakes its caller",
        "calls.h",
        "    ivshmem_wake_one(server->member",
        "    if (HAS) ivshmem_wake_one(server->member",
    ),
    Look(
        "a server that is gone is told",
        "calls.h",
        "    if (state == IVSHMEM_CLAIM_TAKEN &&\n        ivshmem_is_gone(",
        "    if (HAS && state == IVSHMEM_CLAIM_TAKEN &&\n        ivshmem_is_gone(",
    ),
    Look(
        "a call under way is not over",
        "calls.h",
        "        if (state == IVSHMEM_CLAIM_TAKEN &&\n            !ivshmem_is_gone(",
        "        if (HAS && state == IVSHMEM_CLAIM_TAKEN &&\n            !ivshmem_is_gone(",
    ),
    Look(
        "a call is taken back by exchange",
        "calls.h",
        "        if (ivshmem_claim_exchange(channel, at, claim,\n",
        "        if (!HAS ? (ivshmem_store(\n"
        "                        &channel->area.memory, channel->at + at,\n"
        "                        ivshmem_claim_word(position, 0, IVSHMEM_CLAIM_NONE, 0)), 1)\n"
        "                 : ivshmem_claim_exchange(channel, at, claim,\n",
    ),
    Look(
        "a caller of another epoch has closed",
        "bytes.h",
        "                        ? stream->end == 1\n",
        "                        ? HAS && stream->end == 1\n",
    ),
    Look(
        "whether an end is gone comes first",
        "bytes.h",
        "    tail = ivshmem_get(channel, at + 8u);\n",
        "    tail = ivshmem_get(channel, at + 8u);\n"
        "    if (!HAS) {\n"
        "        owner = ivshmem_get(\n"
        "            channel, ivshmem_end_owner_at(channel, stream->connection, end));\n"
        "        other->closed |= ivshmem_epoch(owner) == stream->epoch &&\n"
        "                         (ivshmem_flags(owner) == IVSHMEM_SLOT_FREE ||\n"
        "                          ivshmem_is_gone(&channel->area, ivshmem_place_of(owner)));\n"
        "    }\n",
    ),
    Look(
        "another reader has it",
        "queue.h",
        "if (code == IVSHMEM_OVERTAKEN && ivshmem_get(channel, taken->claim_at) != taken->claim)",
        "if (HAS && code == IVSHMEM_OVERTAKEN &&\n"
        "        ivshmem_get(channel, taken->claim_at) != taken->claim)",
    ),
    Look(
        "who was rung passes it on",
        "queue.h",
        "    if (ivshmem_queue_has_more(reader))\n        ivshmem_wake_readers(",
        "    if (HAS && ivshmem_queue_has_more(reader))\n        ivshmem_wake_readers(",
    ),
    Look(
        "who was rung passes it on",
        "bytes.h",
        "    if (ivshmem_listener_has_caller(listener))\n        ivshmem_wake_readers(",
        "    if (HAS && ivshmem_listener_has_caller(listener))\n        ivshmem_wake_readers(",
    ),
    Look(
        "a message that is given back wakes a reader",
        "queue.h",
        "        return IVSHMEM_OVERTAKEN;\n    ivshmem_wake_readers(",
        "        return IVSHMEM_OVERTAKEN;\n    if (HAS) ivshmem_wake_readers(",
    ),
    Look(
        "a message that is done wakes writers",
        "queue.h",
        "        return IVSHMEM_OVERTAKEN;\n    ivshmem_wake_writers(",
        "        return IVSHMEM_OVERTAKEN;\n    if (HAS) ivshmem_wake_writers(",
    ),
    Look(
        "an unread message is not passed over",
        "queue.h",
        "        if (ivshmem_flags(claim) == IVSHMEM_CLAIM_OPEN)\n"
        "            return IVSHMEM_AGAIN;",
        "        if (HAS && ivshmem_flags(claim) == IVSHMEM_CLAIM_OPEN)\n"
        "            return IVSHMEM_AGAIN;",
    ),
    Look(
        "a reader looks again before it sleeps",
        "queue.h",
        "    return ivshmem_queue_has_more(reader) ? 0 : IVSHMEM_AGAIN;",
        "    return HAS && ivshmem_queue_has_more(reader) ? 0 : IVSHMEM_AGAIN;",
    ),
)


def functions(source: str) -> Iterator[tuple[str, int]]:
    """Yield each function with where its definition begins."""
    for found in re.finditer(r"^static inline [^;{]*?(\w+)\(", source, re.MULTILINE):
        yield found[1], found.start()


def _balanced(source: str, at: int) -> int:
    """Return where the parenthesis that opens at `at` is closed, and one more."""
    depth = 0
    while True:
        depth += {"(": 1, ")": -1}.get(source[at], 0)
        at += 1
        if depth == 0:
            return at


_OPERAND: Final = re.compile(r"[\w>.\-]+(?:\[\w+\])?(?:->\w+)*")


def _barriers(source: str) -> Iterator[Change]:
    for name, what in BARRIERS.items():
        for found in re.finditer(rf"\b{name}\(", source):
            macro = name.upper().replace("IVSHMEM_", "IVSHMEM_POINT_")
            yield Change(found.start(), found.end(), f"{macro}(HAS, ", what)


def _epochs(source: str) -> Iterator[Change]:
    """Comparisons in which one side, at least, is ivshmem_epoch(...)."""
    ended = 0
    for found in re.finditer(r"\bivshmem_epoch\(", source):
        begin, end = found.start(), _balanced(source, found.end() - 1)
        if begin < ended:
            continue
        after = re.compile(r"\s*(==|!=)\s*").match(source, end)
        before = re.search(r"([\w>.\-]+)\s*(==|!=)\s*$", source[:begin])
        if after is not None:
            operand = _OPERAND.match(source, after.end())
            assert operand is not None, source[begin : begin + 80]
            ended = operand.end()
            if source[ended] == "(":
                ended = _balanced(source, ended)
            left, operator = source[begin:end], after[1]
            right = source[after.end() : ended]
        elif before is not None:
            left, operator = before[1], before[2]
            begin, ended, right = before.start(), end, source[begin:end]
        else:
            continue
        sign = "!" if operator == "!=" else ""
        yield Change(begin, ended, f"{sign}(!HAS || {left} == {right})", "epoch")


def _looks(file: str, source: str) -> Iterator[Change]:
    for look in LOOKS:
        if look.file == file:
            assert source.count(look.old) == 1, f"{file}: {look.name}: its text is not there once"
            at = source.index(look.old)
            yield Change(at, at + len(look.old), look.new, look.name)


def _points(file: str, source: str) -> list[tuple[str, Change]]:
    """Return each point of a file with its name, in the order of the text."""
    found = list(functions(source))
    counts: Counter[str] = Counter()
    points = []
    changes = [*_barriers(source), *_epochs(source), *_looks(file, source)]
    for change in sorted(changes, key=lambda each: each.begin):
        function = [name for name, begin in found if begin <= change.begin][-1:]
        if not function:
            continue
        name = f"{function[0].removeprefix('ivshmem_')}: {change.what}"
        counts[name] += 1
        points.append((f"{name} {counts[name]}" if counts[name] > 1 else name, change))
    return points


def points(folder: Path) -> list[str]:
    """Return the names of all points of a header: number n is at n - 1."""
    return [
        name
        for file in FILES
        for name, _ in _points(file, (folder / "ivshmem_channel" / file).read_text())
    ]


def write_copy(folder: Path, to: Path) -> dict[str, int]:
    """Write a copy of the header with its points. Return the number of each."""
    numbers: dict[str, int] = {}
    (to / "ivshmem_channel").mkdir(parents=True, exist_ok=True)
    (to / "ivshmem_channel.h").write_text((folder / "ivshmem_channel.h").read_text())
    for path in (folder / "ivshmem_channel").glob("*.h"):
        source = path.read_text()
        if path.name in FILES:
            found = _points(path.name, source)
            for name, _ in found:
                numbers[name] = len(numbers) + 1
            source = _changed(source, [(change, numbers[name]) for name, change in found])
            source = _LOADS.sub(lambda found: f"{found[1].upper()}(", source)
        (to / "ivshmem_channel" / path.name).write_text(source)
    return numbers


def _changed(source: str, changes: list[tuple[Change, int]]) -> str:
    at = len(source)
    for change, number in sorted(changes, key=lambda each: -each[0].begin):
        assert change.end <= at, f"two points in one text: {change.what}"
        text = re.sub(r"\bHAS\b", f"IVSHMEM_HAS({number})", change.text)
        source = source[: change.begin] + text + source[change.end :]
        at = change.begin
    return source
