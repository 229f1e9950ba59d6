"""Objects that own a descriptor, a mapping or a thread, and can therefore not be copied.

Knows: how Python copies and pickles. Does not know: what is owned.

A copy would have the number of a descriptor, but not the descriptor: the first of the two that is
collected closes it for the other, or waits for a thread that only the other has.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn, SupportsIndex


class Uncopied:
    """A base of such classes: copy.copy, copy.deepcopy and pickle raise TypeError."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        name = type(self).__qualname__
        what = f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
        raise TypeError(
            f"{what} cannot be copied or pickled, because it owns descriptors: hand on the"
            " object itself, or make another in the other process"
        )
