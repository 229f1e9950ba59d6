"""Builds the modules in Cython; everything else about the package stands in pyproject.toml.

Where Cython is importable the C files are generated afresh, so that a newer Cython can carry an old
release to a newer Python; where it is not, the committed C files serve, and a C compiler is
enough.
"""

import glob
import os

from setuptools import Extension, setup

NATIVE = ("descriptors", "wire", "mapping", "spin", "bell", "areas")
CHANNEL = (
    "membership",
    "records",
    "ends",
    "sleeping_tasks",
    "roles",
    "writers",
    "views",
    "readers",
    "queues",
    "calls",
    "streams",
    "stream_poll",
    "pumps",
)


def extensions(suffix: str) -> list[Extension]:
    return [
        Extension(
            f"ivshmem.{name.replace('/', '.')}",
            [f"src/ivshmem/{name}{suffix}"],
            include_dirs=["src/ivshmem/channel"],
            depends=glob.glob("src/ivshmem/channel/**/*.h", recursive=True),
            # No -O: it would stand behind the one in CFLAGS, of a distribution for example.
            extra_compile_args=["-fvisibility=hidden"],
        )
        for name in (
            *(f"native/{name}" for name in NATIVE),
            *(f"channel/{name}" for name in CHANNEL),
            "_core",
        )
    ]


try:
    from Cython.Build import cythonize
except ImportError:
    modules = extensions(".c")
else:
    modules = cythonize(extensions(".pyx"), build_dir="build/cython")  # the committed files stay

setup(
    ext_modules=modules,
    options={"build_ext": {"parallel": os.cpu_count()}},  # files of equal size
)
