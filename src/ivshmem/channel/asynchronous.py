"""Internal: the waits of ends for asyncio, which are imported with the first of them.

asyncio takes half of the time to import channels, and a program that does not use it goes without.

Knows: where the waits are (sleeping_tasks.py). Does not know: what they do.
"""

from __future__ import annotations

from ..system.late_names import late_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .sleeping_tasks import until_in_time, until_no_wait, until_something

__all__ = ["until_in_time", "until_no_wait", "until_something"]


def __getattr__(name: str) -> object:
    return late_name(__name__, name, dict.fromkeys(__all__, f"{__package__}.sleeping_tasks"))
