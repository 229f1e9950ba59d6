"""A bundle in a real guest: the interpreter there finds no package, only the file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import ivshmem
from ivshmem.cli import guest_bundle as bundle
from ivshmem.qemu import cmdline

from .harness import MakeGuest

PROGRAM = """
    import json, os, subprocess, sys

    def run(*arguments):
        command = [sys.executable, "-I", "-S", BUNDLE, "guest", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env={"HOME": "/tmp/home"})
        assert done.returncode == 0, done
        return done.stdout

    (found,) = json.loads(run("list", "--json"))
    assert found["variant"] == "doorbell", found
    assert run("hexdump", "0", "5", "--raw") == "hello"
    assert run("ring", "0", "1") == "rang 1 doorbell\\n"
    print("RANG", json.loads(run("info", "--json"))["access"], os.listdir("/tmp/home/.cache"))
    """


@pytest.mark.nightly
@pytest.mark.parametrize("form", ["pyz", "tar"])
def test_a_guest_with_the_bundle_alone(
    guest: MakeGuest, server: ivshmem.Server, host: ivshmem.Client, tmp_path: Path, form: str
) -> None:
    file = tmp_path / f"ivshmem.{form}"
    bundle.write(str(file), form)
    program = file
    if form == "tar":
        shutil.unpack_archive(file, tmp_path, "tar")
        program = tmp_path / "ivshmem/ivshmem.pyz"
    with memoryview(host.region) as memory:
        memory[:5] = b"hello"
    unpacks = "[]" if form == "tar" else "['ivshmem']"
    a = guest(
        "import os; os.makedirs('/tmp/home/.cache')\n"
        + PROGRAM.replace("\n    ", "\n").replace("BUNDLE", repr(str(program))),
        args=cmdline.doorbell(server.path, 4),
        iommu=True,
    )
    assert a.expect("RANG", 700) == f"RANG vfio {unpacks}"
    assert host.wait(1, 10) == 1
    assert a.wait() == 0
