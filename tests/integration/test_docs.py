"""The pages of docs/ build without a warning, as `make docs` builds them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.pages import HOME


@pytest.mark.nightly
def test_the_pages_build_without_a_warning(tmp_path: Path) -> None:
    """Without HTML, which is a third of the time and gives no warnings of its own."""
    pytest.importorskip("sphinx", reason="needs Sphinx: make .venv/documented")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "dummy"]
    built = subprocess.run(
        [*command, "-d", tmp_path / "cache", HOME / "docs", tmp_path / "pages"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    assert built.stderr == ""
