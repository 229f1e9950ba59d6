from typing import NamedTuple

from .mapping import Mapping

class Area(NamedTuple):
    offset: int
    size: int
    places: int
    records: int
    unit: int
    units: int

def make_area(
    mapping: Mapping, offset: int, size: int, places: int = 0, records: int = 0
) -> Area: ...
def area_of(mapping: Mapping, offset: int) -> Area | None: ...
def find_area(mapping: Mapping) -> Area | None: ...
def peers_of(mapping: Mapping) -> list[int]: ...
def sweep(mapping: Mapping, offset: int) -> int: ...
def free_place(mapping: Mapping, offset: int, index: int) -> bool: ...
