"""Builds the modules in Cython; everything else about the package stands in pyproject.toml.

Where Cython is importable the C files are generated afresh, so that a newer Cython can carry an old
release to a newer Python; where it is not, the committed C files serve, and a C compiler is
enough.

The modules fit the CPython that builds them. With IVSHMEM_ABI3=1 in the environment they fit 3.10
and all newer ones ("abi3"), so that one wheel is enough, and guests can run what the host has:
`make wheels` does that. 3.10, whose headers lack what is needed, and an interpreter without a GIL
build for themselves in any case. bench/README.md says what it costs.
"""

import glob
import os
import sys
import sysconfig

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

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

# In a wheel for all versions, of which guests get a copy, what copies payloads has -O2. The rest
# has -Os, which makes it a third smaller, and copies by `rep movsb`. An -O in CFLAGS, of a
# distribution for example, is for all.
FAST = {
    "native/bell",
    "native/mapping",
    *(
        f"channel/{name}"
        for name in (
            *("membership", "roles", "writers", "views", "readers"),
            *("queues", "calls", "streams"),
        )
    ),
}
ABI3 = (
    sys.version_info >= (3, 11)
    and sys.implementation.name == "cpython"
    and not sysconfig.get_config_var("Py_GIL_DISABLED")
    and os.environ.get("IVSHMEM_ABI3") == "1"
)


class Build(build_ext):
    """Removes what an earlier build made for another interpreter: Python would load that first."""

    def run(self) -> None:
        for extension in self.extensions:
            path = self.get_ext_fullpath(extension.name)
            for other in glob.glob(f"{path.partition('.cpython-')[0].partition('.abi3.')[0]}.*.so"):
                if os.path.abspath(other) != os.path.abspath(path):
                    os.remove(other)
        super().run()


def flags(name: str) -> list[str]:
    given = ["-fvisibility=hidden"]
    if "-O" not in os.environ.get("CFLAGS", ""):
        given.append("-O2" if name in FAST or not ABI3 else "-Os")
    return [*given, *(("-include", "src/ivshmem/native/limited_api.h") if ABI3 else ())]


def extensions(suffix: str) -> list[Extension]:
    return [
        Extension(
            f"ivshmem.{name.replace('/', '.')}",
            [f"src/ivshmem/{name}{suffix}"],
            include_dirs=["src/ivshmem/channel"],
            depends=glob.glob("src/ivshmem/**/*.h", recursive=True),
            extra_compile_args=flags(name),
            define_macros=[("CYTHON_LIMITED_API", "1")] if ABI3 else [],
            py_limited_api=ABI3,
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
    cmdclass={"build_ext": Build},
    options={
        "build_ext": {"parallel": os.cpu_count()},  # files of equal size
        **({"bdist_wheel": {"py_limited_api": "cp310"}} if ABI3 else {}),
    },
)
