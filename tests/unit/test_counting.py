"""One peer, two peers: in all messages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import ivshmem
from ivshmem import testing
from ivshmem.cli import status_text
from ivshmem.memory.sizes import format_size
from ivshmem.text import all_of, counted

HOME = Path(ivshmem.__file__).parent


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 peers"), (1, "1 peer"), (2, "2 peers"), (1.0, "1 peer"), (0.5, "0.5 peers")],
)
def test_counted(number: float, text: str) -> None:
    assert counted(number, "peer") == text


def test_all_of() -> None:
    assert all_of(1, "writer") == "its only writer is"
    assert all_of(2, "writer") == "all its 2 writers are"


def test_of_everything_one() -> None:
    region = {
        "counts": {"joins": 1, "leaves": 1, "messages": 1, "refused": 1},
        "peers": [None],
    }
    line = status_text.counts_line(region)
    assert line == "1 peer; since the start 1 join, 1 leave, 1 message, 1 refused"
    assert format_size(1) == "1 byte"


def test_reprs() -> None:
    with testing.server() as server, ivshmem.connect(server.path) as client:
        assert repr(client).endswith(", id 0, 1 vector>")
        assert "1 peer>" in repr(server)
        with pytest.raises(ivshmem.NoSuchVector, match=r"has 1 vector$"):
            client.ring(0, 1)


# In an f-string: the expression in the braces, and the noun after them.
_PLURAL = re.compile(
    r"\{([^{}]*)\} (vectors|peers|joins|leaves|slots|regions|descriptors|doorbells|ids)\b"
)
# These are never one, or are what somebody asked for, which is refused.
_NEVER_ONE = {"MAX_VECTORS", "MAX_ID + 1", "limit", "len(numbers)", "len(fds)", "vectors"}


def test_no_message_counts_by_itself() -> None:
    """A new message that does is found here: `counted` knows the singular."""
    found = [
        f"{path.relative_to(HOME)}: {match[0]}"
        for path in sorted(HOME.rglob("*.py"))
        for match in _PLURAL.finditer(path.read_text())
        if match[1] not in _NEVER_ONE
    ]
    assert found == []
