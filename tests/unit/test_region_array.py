"""region.array(): numpy over shared memory, and what keeps it from being wrong or dangerous."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import ivshmem
from ivshmem import Atomic, AtomicU32, AtomicU64, ClosedError, Region

SIZE = 4096


@pytest.fixture
def region() -> Iterator[Region]:
    with Region.create("4K") as made:
        yield made


def test_it_is_the_memory_itself(region: Region) -> None:
    bytes_, words = region.array(), region.array("<u4")
    assert (bytes_.shape, words.shape) == ((SIZE,), (SIZE // 4,))
    words[3] = 0x01020304
    assert region.read(12, 4) == bytes([4, 3, 2, 1])
    region.write(0, b"\xff")
    assert bytes_[0] == 255
    assert words[0] == 255


@pytest.mark.parametrize(
    ("dtype", "shape", "offset", "expected"),
    [
        ("u1", None, 0, (4096,)),
        ("u1", None, 4095, (1,)),
        ("u1", None, 4096, (0,)),
        ("u1", 0, 4096, (0,)),
        ("u1", (), 7, ()),
        ("<f8", None, 8, (511,)),
        ("<f8", 511, 8, (511,)),
        ("<f8", (7, 73), 8, (7, 73)),
        ("<f8", [2, 0, 3], 8, (2, 0, 3)),
        (np.float32, np.int64(5), np.int32(4), (5,)),
        (np.dtype([("a", "u1"), ("b", "<u8")]), None, 3, (454,)),
        ("S3", None, 1, (1365,)),
        ("<c16", 1, SIZE - 16, (1,)),
        (bool, (64, 64), 0, (64, 64)),
    ],
)
def test_shapes(region: Region, dtype: Any, shape: Any, offset: Any, expected: Any) -> None:
    made = region.array(dtype, shape, offset)
    assert made.shape == expected
    assert made.dtype == np.dtype(dtype)
    if made.size:
        assert made.__array_interface__["data"] == (region.address + int(offset), False)


@pytest.mark.parametrize(
    ("dtype", "shape", "offset", "error", "match"),
    [
        ("u1", 4097, 0, ValueError, "no 4097 bytes at 0 in 4096 bytes"),
        ("u1", None, 4097, ValueError, "no 0 bytes at 4097"),
        ("u1", None, -1, ValueError, "no 4097 bytes at -1|no .* bytes at -1"),
        ("u1", -1, 0, ValueError, "no length can be negative"),
        ("u1", (-1, -1), 0, ValueError, "no length can be negative"),
        ("<u8", 1, 4092, ValueError, "a multiple of 8"),
        ("<u8", 2, 4088, ValueError, "no 16 bytes at 4088"),
        ("<u8", 1 << 61, 0, ValueError, "in 4096 bytes"),
        ("<u8", (1 << 32, 1 << 32), 0, ValueError, "in 4096 bytes"),
        ("u1", 1 << 70, 0, ValueError, "in 4096 bytes"),
        ("u1", 1, 1 << 70, ValueError, "in 4096 bytes"),
        (object, None, 0, TypeError, "addresses"),
        (np.dtype([("a", object)]), 1, 0, TypeError, "addresses"),
        ("V0", 1, 0, ValueError, "no bytes"),
        ("S0", None, 0, ValueError, "no bytes"),
        (np.dtype(("<u4", (2,))), None, 0, ValueError, "shape"),
        ("u1", 1.5, 0, TypeError, "integer"),
        ("u1", "12", 0, TypeError, "integer"),
        ("u1", None, 0.0, TypeError, "integer"),
        ("nonsense", None, 0, TypeError, "nonsense"),
    ],
)
def test_what_is_refused(
    region: Region, dtype: Any, shape: Any, offset: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        region.array(dtype, shape, offset)


def test_read_only_memory_gives_read_only_arrays(region: Region) -> None:
    import os

    with Region.from_fd(os.dup(region.fileno()), readonly=True) as readonly:
        made = readonly.array("<u4", 4)
        assert not made.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            made[0] = 1
        with pytest.raises(ValueError, match="WRITEABLE"):
            made.flags.writeable = True
        del made


@pytest.mark.parametrize(
    "make",
    [
        lambda region: region.array(),
        lambda region: region.array("<u8", (4, 4), 64),
        lambda region: region.array("<u8", (4, 4), 64)[1:, ::2].T,
        lambda region: np.from_dlpack(region),
        lambda region: np.frombuffer(region),
    ],
    ids=["bytes", "words", "a view of it", "dlpack", "frombuffer"],
)
def test_an_array_keeps_the_memory(make: Callable[[Region], Any]) -> None:
    region = Region.create("4K")
    made = make(region)
    with pytest.raises(BufferError, match="in use by"):
        region.close()
    assert made.sum() == 0
    del made
    region.close()
    with pytest.raises(ClosedError):
        region.array()


def test_dlpack(region: Region) -> None:
    assert region.__dlpack_device__() == (1, 0)
    made = np.from_dlpack(region)
    assert made.dtype == np.uint8
    assert made.shape == (SIZE,)
    region.write(5, b"\x07")
    assert made[5] == 7


def test_without_numpy(region: Region, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(ImportError, match=r"pip install numpy \(or use memoryview"):
        region.array()
    assert len(memoryview(region)) == SIZE


# -- words ----------------------------------------------------------------------------------------


def test_what_words_say_of_themselves(region: Region) -> None:
    wide, narrow = region.atomic_u64(64), region.atomic_u32(4)
    wide.store(255)
    assert (wide.offset, narrow.offset) == (64, 4)
    assert repr(wide) == "<ivshmem.AtomicU64 at offset 0x40, value 0xff>"
    assert repr(narrow) == "<ivshmem.AtomicU32 at offset 0x4, value 0x0>"
    assert isinstance(wide, Atomic)
    assert issubclass(AtomicU32, Atomic)
    assert issubclass(AtomicU64, Atomic)
    assert "Atomic" in ivshmem.__all__
    region.close()
    assert repr(wide) == "<ivshmem.AtomicU64 at offset 0x40, closed>"


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickle.dumps])
def test_memory_is_not_copied_by_accident(region: Region, way: Callable[[object], object]) -> None:
    for thing in (region, region.atomic_u32(0), region.atomic_u64(0)):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            way(thing)
