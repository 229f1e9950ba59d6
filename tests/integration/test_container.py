"""The container of packages/Containerfile, built and run by podman."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import debian, unpacked
from support.waiting import until

import ivshmem

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(3600)]


def podman(*words: str) -> str:
    done = subprocess.run(
        ["podman", *words], capture_output=True, text=True, check=False, timeout=3000
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout.strip()


@pytest.fixture
def image() -> Iterator[str]:
    """Of this source, on a root of Debian 13: the image that the file names is in a registry."""
    if not shutil.which("podman"):
        pytest.skip("apt-get install podman crun")
    name = f"ivshmem-test-{uuid.uuid4().hex[:8]}"
    try:
        base = debian.tarball(debian.cache_folder(), "trixie", "minimal")
    except unpacked.CannotError as error:
        pytest.fail(str(error), pytrace=False)
    podman("import", str(base), f"localhost/{name}-base")
    try:
        podman(
            *("build", "--isolation=chroot", "--network=host", "-t", name),
            *("--build-arg", f"BASE=localhost/{name}-base"),
            *("-f", str(debian.HOME / "packages/Containerfile"), str(debian.HOME)),
        )
        yield f"localhost/{name}"
    finally:
        podman("rmi", "--force", name, f"localhost/{name}-base")


def test_socket_and_memory_are_volumes(image: str, tmp_path: Path) -> None:
    run, memory = tmp_path / "run", tmp_path / "memory"
    run.mkdir()
    memory.mkdir()
    # Of this machine: its limits are below podman's, and crun refuses two kinds of cgroups at once.
    limits = ("--ulimit=nofile=4096:4096", "--ulimit=nproc=1000:1000", "--cgroups=disabled")
    hybrid = Path("/sys/fs/cgroup/unified").exists()
    apart = ["unshare", "--mount", "sh", "-c", 'umount /sys/fs/cgroup/unified && exec "$@"', "sh"]
    volumes = ("-v", f"{run}:/run/ivshmem", "-v", f"{memory}:/memory")
    name = image.rpartition("/")[2]
    command = ["podman", "run", "--rm", "--name", name, "--network=host", *limits, *volumes, image]
    with subprocess.Popen(
        [*(apart if hybrid else []), *command, "--size", "1M", "--vectors", "2"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            until((run / "socket").exists)
            here = os.getcwd()
            os.chdir(run)  # a socket's path is short
            try:
                # The socket is there a moment before the server listens.
                first = ivshmem.connect("socket", timeout=60, wait_for_server=True)
                with first as a, ivshmem.connect("socket") as b:
                    with memoryview(a.region) as view:
                        view[:5] = b"hello"
                    a.ring(b.id, 1)
                    assert b.wait(1, timeout=60)
            finally:
                os.chdir(here)
            assert (memory / "region").read_bytes()[:5] == b"hello"
            podman("stop", name)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
    assert list(run.iterdir()) == []
