"""Internal: the waits of ends for asyncio, which are imported with the first of them.

asyncio takes half of the time to import channels, and a program that does not use it goes without.

Knows: where the waits are (sleeping_tasks.py). Does not know: what they do.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .sleeping_tasks import until_in_time, until_no_wait, until_something

__all__ = ["until_in_time", "until_no_wait", "until_something"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # What importlib.import_module does, without importlib.
    module = __import__(f"{__package__}.sleeping_tasks", fromlist=(name,))
    value = globals()[name] = getattr(module, name)
    return value
