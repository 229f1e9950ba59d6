"""Another user has been at a path before root's processes: tests/vm/inside/attacks.py, here.

With the values that this machine's fs.protected_symlinks and its like have; with all others in a
guest, by tests/vm/test_other_users.py.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "vm" / "inside"))

import attacks  # type: ignore[import-not-found]

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user: needs root")


@pytest.mark.parametrize("attack", attacks.ATTACKS, ids=lambda attack: attack.__name__)
def test_attack(attack: Callable[[Path, Path], None], directory: Path) -> None:
    directory.chmod(0o755)
    attacks.run(attack, directory)
