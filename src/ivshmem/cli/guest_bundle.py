"""One file with the package for a guest that has Python and nothing else.

Knows: which parts of the package a guest uses, and the forms of the file.
Does not know: how the modules are loaded there: bundled.py does.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import os
import struct
import sys
import tarfile
import zipfile
from pathlib import Path

from .. import __version__
from ..errors import IvshmemError
from ..system.new_files import NewFile
from . import bundled, disk_image

PACKAGE = Path(__file__).parents[1]
# Servers, migrations and measurements stay on the host, and so do declarations for compilers.
LEFT_OUT = {"bench", "testing", "migration"}
PROGRAM = "ivshmem.pyz"
LABEL = "IVSHMEM"  # of the disk image
_START = b"#!/usr/bin/env python3\n"
_RUNNER = "ivshmem_bundled"  # bundled.py, beside the package
# Any Python from 2.6 on understands this part, and can say that it is too old.
_MAIN = """import sys

if sys.version_info < (3, 10):
    found = "%d.%d" % tuple(sys.version_info[:2])
    sys.exit("ivshmem: Python 3.10 or newer is needed, and this is Python " + found)
if __name__ == "__main__":
    from ivshmem_bundled import run

    sys.exit(run(sys.argv[0], {made!r}))
"""
_TIME = (1980, 1, 1, 0, 0, 0)  # the same package gives the same bytes
FORMS = ("pyz", "tar", "tar.xz", "iso")


def form_of(path: str) -> str:
    """The form that the ending of a path asks for.

    Raises:
        IvshmemError: it asks for none.
    """
    for form in FORMS:
        if path.endswith(f".{form}"):
            return form
    raise IvshmemError(
        f"{path}: what kind of file? End its name in .pyz (a program), .tar, .tar.xz, or .iso (a"
        " disk image)"
    )


def make(form: str) -> bytes:
    """The bytes of a bundle."""
    modules = compiled()
    if form == "pyz":
        return _program(modules, packed=True)
    files = {PROGRAM: _program(modules, packed=False)}
    folder = {f"{bundled.BESIDE}/{name}": data for name, data in modules.items()}
    if form == "iso":
        return disk_image.image(LABEL, {**files, **folder})
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in {**files, **folder}.items():
            member = tarfile.TarInfo(f"ivshmem/{name}")
            member.size, member.mode = len(data), 0o755
            archive.addfile(member, io.BytesIO(data))
    return _xz(out.getvalue()) if form == "tar.xz" else out.getvalue()


def write(path: str, form: str) -> int:
    """Write a bundle, in the place of a file that is there; return its size.

    Raises:
        OSError: it cannot be written, and what was there is still there.
    """
    data = make(form)
    with NewFile(path, mode=0o755) as draft:
        with open(draft.file[0], "wb", closefd=False) as file:
            file.write(data)
        draft.publish(replace=True)
    return len(data)


def compiled() -> dict[str, bytes]:
    """The compiled modules, by their file names in a bundle."""
    found = {
        ".".join(("ivshmem", *path.relative_to(PACKAGE).parts)): loaded(path.read_bytes())
        for path in sorted(PACKAGE.rglob("*.so"))
    }
    if not found:
        raise IvshmemError(f"{PACKAGE} has no compiled modules: install the package again")
    return found


def loaded(module: bytes) -> bytes:
    """What a process maps of an ELF file: all but the symbols for debuggers, which can be most."""
    if module[:6] != b"\x7fELF\2\1":  # 64 bits, least significant byte first
        return module
    at, size, count = (
        struct.unpack_from("<Q", module, 32)[0],
        *struct.unpack_from("<HH", module, 54),
    )
    end = max(
        sum(struct.unpack_from("<Q16xQ", module, at + number * size + 8)) for number in range(count)
    )
    header = bytearray(module[:end])
    struct.pack_into("<Q", header, 40, 0)  # no sections: they describe what is cut off
    struct.pack_into("<HH", header, 60, 0, 0)
    return bytes(header)


def fits() -> str:
    """The only version of Python that the modules fit; "" if they fit 3.10 and all newer ones."""
    if all(".abi3." in name for name in compiled()):
        return ""
    return ".".join(map(str, sys.version_info[:2]))


def _program(modules: dict[str, bytes], *, packed: bool) -> bytes:
    digest = hashlib.sha256(b"".join(modules.values())).hexdigest()[:16]
    made = {
        "machine": os.uname().machine,
        "python": fits(),
        "digest": f"{__version__}-{digest}",
        "packed": "yes" if packed else "",
    }
    out = io.BytesIO()
    out.write(_START)
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        _add(archive, "__main__.py", _MAIN.format(made=made).encode())
        _add(archive, f"{_RUNNER}.py", Path(bundled.__file__).read_bytes())
        for path in sorted(PACKAGE.rglob("*.py")):
            inside = path.relative_to(PACKAGE)
            if inside.parts[0] not in LEFT_OUT:
                _add(archive, f"ivshmem/{inside}", path.read_bytes())
        if packed:
            _add(archive, bundled.PACKED, _packed(modules), zipfile.ZIP_STORED)
    return out.getvalue()


def _add(archive: zipfile.ZipFile, name: str, data: bytes, how: int = zipfile.ZIP_DEFLATED) -> None:
    entry = zipfile.ZipInfo(name, _TIME)
    entry.compress_type = how
    entry.external_attr = 0o644 << 16
    archive.writestr(entry, data)


def _packed(modules: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in modules.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o700
            archive.addfile(member, io.BytesIO(data))
    return _xz(out.getvalue())


def _xz(data: bytes) -> bytes:
    filters = [{"id": lzma.FILTER_X86}] if os.uname().machine == "x86_64" else []
    filters.append({"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME})
    return lzma.compress(data, filters=filters)
