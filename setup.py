"""Builds ivshmem._core; everything else about the package stands in pyproject.toml.

Where Cython is importable the C file is generated afresh, so that a newer Cython can carry an old
release to a newer Python; where it is not, the committed _core.c serves, and a C compiler is
enough.
"""

import os

from setuptools import Extension, setup

SANITIZE = os.environ.get("IVSHMEM_SANITIZE")  # for instance "address,undefined"

flags = ["-O2", "-fvisibility=hidden"]
link = []
if SANITIZE:
    flags = ["-O1", "-g", "-fno-omit-frame-pointer", f"-fsanitize={SANITIZE}"]
    link = [f"-fsanitize={SANITIZE}"]


def extension(source: str) -> Extension:
    return Extension("ivshmem._core", [source], extra_compile_args=flags, extra_link_args=link)


try:
    from Cython.Build import cythonize
except ImportError:
    modules = [extension("src/ivshmem/_core.c")]
else:
    modules = cythonize([extension("src/ivshmem/_core.pyx")])

setup(ext_modules=modules)
