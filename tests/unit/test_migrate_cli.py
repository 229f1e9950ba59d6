"""What `ivshmem migrate` takes and shows; what it does is in tests/vm."""

from __future__ import annotations

import io

import pytest

from ivshmem.cli.main import main
from ivshmem.cli.migrate_run import ProgressLines
from ivshmem.cli.progress import ProgressBar
from ivshmem.migration import Step
from ivshmem.migration import TransferProgress as Migrated

NOW = Migrated(
    transferred=1, remaining=32 << 20, total=128 << 20, shared=64 << 20, rate=16 << 20, passes=2
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class EachShown(ProgressBar):
    """Waits until what was shown is there; otherwise the next one may take its place."""

    def show(self, share: float | None, what: str) -> None:
        super().show(share, what)
        self._out.settle()


def shown(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    with EachShown(stream) as progress:
        shows = ProgressLines(progress, stream.isatty())
        shows.steps = 4
        shows.step(2, Step("migrate", "db", size=64 << 20), False)
        shows.migrating(NOW)
        shows.migrating(NOW)
        shows.step(1, Step("hold", control="/c"), True)
    return stream.getvalue()


def test_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(Terminal(), monkeypatch)
    assert (
        "[##################......]  75%  step 2 of 4: migrate db, with the shared memory: 96.0 MiB"
        " of 128.0 MiB, 64.0 MiB of it shared; 16.0 MiB/s, 2 s left (pass 2)" in text
    )
    assert text.endswith("\r\033[K")


def test_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(io.StringIO(), monkeypatch).splitlines() == [
        " 25%  step 2 of 4: migrate db, with the shared memory",
        "  0%  undo step 1 of 4: hold leaves back from the QEMUs of /c",
    ]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "one of the arguments --vm --group is required"),
        (["--vm", "db"], "give NAME=SOURCE,DESTINATION,URI"),
        (["--vm", "db=/a,/b"], "give NAME=SOURCE,DESTINATION,URI"),
        (["--vm", "db=/a,,tcp:h:1"], "give NAME=SOURCE,DESTINATION,URI"),
        (["--vm", "db=/a,/b,tcp:h:1", "--timeout", "0"], "give seconds above 0"),
        (["--vm", "db=/a,/b,tcp:h:1", "--dry-run", "--resume"], "not allowed with"),
    ],
)
def test_wrong_usage(arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["migrate", *arguments])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert reason in said
    assert said.count("\n") == 1


def test_what_is_refused_is_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    same = "a=/nowhere/a,/nowhere/a,exec:cat"
    assert main(["migrate", "--vm", same, "--vm", same]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 2
    assert all(line.startswith("ivshmem: ") for line in lines)


def test_nothing_to_resume(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/nowhere")
    for option in ("--resume", "--put-back"):
        assert main(["migrate", "--vm", "a=/a,/b,tcp:h:1", option]) == 1
        assert "no unfinished migration of these VMs" in capsys.readouterr().err
