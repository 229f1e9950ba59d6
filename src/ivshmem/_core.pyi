from collections.abc import Sequence
from typing import Final, NamedTuple, overload

from typing_extensions import Buffer, Self

