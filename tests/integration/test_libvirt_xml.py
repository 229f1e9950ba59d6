"""The XML that is printed for libvirt, by libvirt's own schema."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest

from ivshmem.qemu import cmdline

# Debian: apt-get install libvirt0 libxml2-utils
SCHEMA = Path(os.environ.get("LIBVIRT_SCHEMAS", "/usr/share/libvirt/schemas"), "domain.rng")
DOMAIN = (
    "<domain type='kvm'><name>guest</name><memory unit='MiB'>64</memory>"
    "<os><type arch='x86_64' machine='q35'>hvm</type></os><devices>%s</devices></domain>"
)

needs_libvirt = pytest.mark.skipif(
    not (SCHEMA.exists() and shutil.which("xmllint")),
    reason="libvirt's schema or xmllint is missing: apt-get install libvirt0 libxml2-utils",
)

PATHS = ["/run/ivshmem/db", "/run/a b", '/run/it\'s "<&>"', "/run/größe", "/run/a,b=c"]


def complaints(devices: str) -> str:
    """What xmllint says of a domain with these devices; "" if it is well."""
    result = subprocess.run(
        ["xmllint", "--noout", "--nonet", "--relaxng", str(SCHEMA), "-"],
        input=DOMAIN % devices,
        capture_output=True,
        text=True,
        check=False,
    )
    return "" if result.returncode == 0 else result.stderr


@pytest.mark.sampled(3)
@needs_libvirt
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("vectors", [0, 1, 2048])
@pytest.mark.parametrize("master", [False, True])
def test_a_device_with_a_server(path: str, vectors: int, master: bool) -> None:
    assert not complaints(cmdline.libvirt_doorbell(path, vectors, master=master))


@needs_libvirt
def test_several_regions_in_a_guest() -> None:
    names = ["db", "logs-2", "_x"]
    devices = [cmdline.libvirt_doorbell(f"/run/{name}", 4, name=name) for name in names]
    assert not complaints("\n".join(devices))


@needs_libvirt
@pytest.mark.parametrize("size", [4096, 1 << 20, 1 << 40])
def test_plain_memory(size: int) -> None:
    assert not complaints(cmdline.libvirt_plain("a name & more", size, master=True))


@needs_libvirt
@pytest.mark.parametrize(
    ("good", "bad"), [("msi vectors='1'", "msi vectors='-1'"), ("<server", "<sever")]
)
def test_the_schema_finds_what_is_wrong(good: str, bad: str) -> None:
    xml = cmdline.libvirt_doorbell("/run/db", 1)
    assert good in xml
    assert "fails to validate" in complaints(xml.replace(good, bad))


@pytest.mark.parametrize("path", PATHS)
def test_what_the_xml_says(path: str) -> None:
    xml = ElementTree.fromstring(cmdline.libvirt_doorbell(path, 3, name="db"))  # noqa: S314
    assert xml.tag == "shmem"
    assert xml.attrib == {"name": "db"}
    assert {child.tag: child.attrib for child in xml} == {
        "model": {"type": "ivshmem-doorbell"},
        "server": {"path": path},
        "address": {
            "type": "pci",
            "domain": "0",
            "bus": "0",
            "function": "0",
            "slot": f"{cmdline.slot_of('db'):#04x}",
        },
        "msi": {"vectors": "3", "ioeventfd": "on"},
    }


def test_slots() -> None:
    """Always the same for a name, and another where that one is taken; all are possible ones."""
    names = [f"region-{number}" for number in range(200)]
    assert {cmdline.slot_of(name) for name in names} == set(range(0x10, 0x1B))
    assert [cmdline.slot_of(name) for name in names] == [cmdline.slot_of(name) for name in names]
    taken: list[int] = []
    for name in names[:11]:
        taken.append(cmdline.slot_of(name, taken))
    assert sorted(taken) == list(range(0x10, 0x1B))
    xml = cmdline.libvirt_doorbell("/run/s", 1, slot=3)
    assert "<address type='pci' domain='0' bus='0' slot='0x03' function='0'/>" in xml
