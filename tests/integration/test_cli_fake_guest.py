"""Commands in a virtual machine, whose device is a fake: what they say."""

from __future__ import annotations

import io
import threading

import pytest
from support.waiting import PATIENCE, until

from ivshmem.cli import main
from ivshmem.testing import fake_device


class Screen(io.StringIO):
    """What says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_command_without_a_server_names_the_device(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, socket_path: str
) -> None:
    """The same command without `--guest` is the first that a person tries in a guest."""
    monkeypatch.setattr("ivshmem.peer.default_paths._places", lambda: [socket_path])
    with fake_device():
        assert main.main(["channel", "ls"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("or give -S PATH; or --guest for the device of this virtual machine")


@pytest.mark.parametrize(("words", "what"), [([], "any vector"), (["0"], "vector 0")])
def test_wait_says_when_it_listens(
    monkeypatch: pytest.MonkeyPatch, words: list[str], what: str
) -> None:
    """On a terminal: a ring that came before would be lost. Then the interrupt comes."""
    screen = Screen()
    monkeypatch.setattr("sys.stderr", screen)
    with fake_device() as device:

        def ring() -> None:
            until(screen.getvalue)
            device.interrupt(0)

        rings = threading.Thread(target=ring)
        rings.start()
        assert main.main(["guest", "wait", *words, "--timeout", str(PATIENCE)]) == 0
        rings.join()
    assert screen.getvalue() == f"listening on {what}; Ctrl-C ends it\n"
