"""Internal: names of a module that are imported when they are first used.

Knows: how a module gets a name from another one. Does not know: which names, and why late.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping


def late_name(module: str, name: str, homes: Mapping[str, str]) -> object:
    """Import a name for the `__getattr__` of a module, which has it from then on.

    Args:
        module: the full name of the module.
        name: what is looked up there.
        homes: the full name of the module where each late name is.

    Raises:
        AttributeError: the name is not one of these.
    """
    home = homes.get(name)
    if home is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    # What importlib.import_module does, without importlib.
    value = getattr(__import__(home, fromlist=(name,)), name)
    setattr(sys.modules[module], name, value)
    return value
