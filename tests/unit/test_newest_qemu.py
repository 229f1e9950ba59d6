"""How a newer QEMU is unpacked: which suite, when again, and what is said when that fails.

The script runs as a process; mmdebstrap, patchelf and apt-get are stand-ins that do what files
beside them say. The real ones need a network: `tests/vm` and CI use those.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "vm" / "newest_qemu.py"
UNPACKED = Path(__file__).parents[1] / "support" / "unpacked.py"

# The suite and the folder are the last words but one and two.
MMDEBSTRAP = """#!/bin/sh
for word; do before3=$before2; before2=$before; before=$word; done
suite=$before3 folder=$before2
echo "$suite $before" >>"$0.calls"
[ ! -e "$0.$suite.fails" ] || { echo "E: $suite is not reachable"; exit 3; }
mkdir -p "$folder/usr/bin" "$folder/usr/lib64" "$folder/var"
cat >"$folder/usr/bin/qemu-system-x86_64" <<END
#!/bin/sh
[ ! -e "$0.$suite.broken" ] || exit 1
[ "\\$1" = --version ] && echo "QEMU of $suite" || echo ivshmem-doorbell
END
chmod +x "$folder/usr/bin/qemu-system-x86_64"
"""
APT = "#!/bin/sh\necho http://mirror.invalid/debian\n"


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    folder = tmp_path / "tools"
    folder.mkdir()
    for name, text in (("mmdebstrap", MMDEBSTRAP), ("patchelf", "#!/bin/sh\n"), ("apt-get", APT)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def run(tools: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": f"{tools}:/usr/bin:/bin"}
    command = [sys.executable, str(SCRIPT), str(tools.parent / "kept")]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=60
    )


def fails(tools: Path, suite: str, how: str = "fails") -> None:
    (tools / f"mmdebstrap.{suite}.{how}").touch()


def calls(tools: Path) -> list[str]:
    path = tools / "mmdebstrap.calls"
    return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []


def test_the_newest_suite_is_unpacked_once(tools: Path) -> None:
    first, second = run(tools), run(tools)
    assert first.returncode == second.returncode == 0
    assert first.stdout == second.stdout, "the path and nothing else"
    assert first.stdout == f"{tools.parent}/kept/sid/usr/bin/qemu-system-x86_64\n"
    assert first.stderr == "newest_qemu: QEMU of sid\n"
    assert calls(tools) == ["sid"]
    assert "http://mirror.invalid/debian" in (tools / "mmdebstrap.calls").read_text()


@pytest.mark.parametrize("how", ["fails", "broken"])
def test_the_stable_suite_does_instead_and_that_is_said(tools: Path, how: str) -> None:
    fails(tools, "sid", how)
    done = run(tools)
    assert done.returncode == 0
    assert done.stdout == f"{tools.parent}/kept/trixie/usr/bin/qemu-system-x86_64\n"
    assert "sid cannot be unpacked: " in done.stderr
    assert "QEMU of trixie" in done.stderr
    assert sorted(os.listdir(tools.parent / "kept")) == ["lock", "trixie"], "nothing half-done"


def test_the_next_run_tries_the_newest_suite_again(tools: Path) -> None:
    fails(tools, "sid")
    run(tools)
    (tools / "mmdebstrap.sid.fails").unlink()
    assert run(tools).stdout.endswith("/sid/usr/bin/qemu-system-x86_64\n")


def test_an_old_copy_is_made_anew_and_used_if_that_fails(tools: Path) -> None:
    run(tools)
    copy = tools.parent / "copy"
    for file in (SCRIPT, UNPACKED):
        (copy / file.parent.name).mkdir(parents=True)
        shutil.copy(file, copy / file.parent.name)
    later = UNPACKED.read_text().replace("FRESH = 30 * 86400.0", "FRESH = -1.0")
    assert later != UNPACKED.read_text()
    (copy / "support/unpacked.py").write_text(later)
    old = copy / "vm/newest_qemu.py"
    command = [sys.executable, str(old), str(tools.parent / "kept")]
    environment = {"PATH": f"{tools}:/usr/bin:/bin"}
    for made, word in ((["sid", "sid"], ""), (["sid", "sid", "sid"], "though it is old")):
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True, timeout=60
        )
        assert calls(tools) == made
        assert done.stdout.endswith("/sid/usr/bin/qemu-system-x86_64\n")
        assert word in done.stderr
        fails(tools, "sid")


def test_nothing_can_be_unpacked(tools: Path) -> None:
    fails(tools, "sid")
    fails(tools, "trixie")
    done = run(tools)
    assert done.returncode == 1
    assert not done.stdout
    last = done.stderr.splitlines()[-1]
    assert last.startswith("newest_qemu: neither sid nor trixie can be unpacked (sid: mmdebstrap")
    assert "sid is not reachable" in last


def test_a_tool_that_is_missing_is_named(tools: Path) -> None:
    (tools / "patchelf").unlink()
    environment = {"PATH": str(tools)}
    command = [sys.executable, str(SCRIPT), str(tools.parent / "kept")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "apt-get install patchelf" in done.stderr


def test_no_mirror_is_known(tools: Path) -> None:
    (tools / "apt-get").write_text("#!/bin/sh\n")
    done = run(tools)
    assert done.returncode == 1
    assert "apt knows no mirror of Debian: apt-get update" in done.stderr
