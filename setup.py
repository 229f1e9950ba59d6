"""Builds the modules in Cython; everything else about the package stands in pyproject.toml.

Where Cython is importable the C files are generated afresh, so that a newer Cython can carry an old
release to a newer Python; where it is not, the committed C files serve, and a C compiler is
enough.

The modules fit the CPython that builds them. With IVSHMEM_ABI3=1 in the environment they fit 3.10
and all newer ones ("abi3"), so that one wheel is enough, and guests can run what the host has:
`make wheels` does that. 3.10, whose headers lack what is needed, and an interpreter without a GIL
build for themselves in any case. bench/README.md says what it costs. All modules are in one file
then, which with -flto is a third smaller; src/ivshmem/native/joined.py finds them there.
"""

import glob
import os
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor

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
    "values",
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
            *("values", "queues", "calls", "streams"),
        )
    ),
}
# A wheel has all modules in one file, and these lines in the place of each.
JOINED = "ivshmem.native._joined"
LINES = "from ivshmem.native.joined import load\n\nload({!r})\n"
FOR_OTHERS = os.environ.get("IVSHMEM_ABI3") == "1"
ABI3 = (
    sys.version_info >= (3, 11)
    and sys.implementation.name == "cpython"
    and not sysconfig.get_config_var("Py_GIL_DISABLED")
    and FOR_OTHERS
)


class Build(build_ext):
    """Removes what an earlier build made: Python would load that first. Builds the joined file."""

    def run(self) -> None:
        ours = {os.path.abspath(self.get_ext_fullpath(each.name)) for each in self.extensions}
        for name in (JOINED, *(part.name for part in PARTS)):
            path = self.path(name)
            for other in glob.glob(f"{path}.*.so"):
                if os.path.abspath(other) not in ours:
                    os.remove(other)
            if os.path.exists(f"{path}.py"):
                os.remove(f"{path}.py")
        super().run()

    def build_extension(self, extension: Extension) -> None:
        if extension.name == JOINED:
            # Not all with the same flags, and as many at once as otherwise.
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                for made in pool.map(self.compiled, PARTS):
                    extension.extra_objects += made
            extension.sources = []
            for part in PARTS:
                path = f"{self.path(part.name)}.py"
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with open(path, "w") as file:
                    file.write(LINES.format(part.name))
        super().build_extension(extension)

    def path(self, name: str) -> str:
        """Where a module is, without any ending."""
        file: str = self.get_ext_fullpath(name)
        return file.partition(".cpython-")[0].partition(".abi3.")[0]

    def compiled(self, part: Extension) -> list[str]:
        objects: list[str] = self.compiler.compile(
            part.sources,
            output_dir=self.build_temp,
            macros=part.define_macros,
            include_dirs=part.include_dirs,
            extra_postargs=part.extra_compile_args,
            depends=part.depends,
        )
        return objects


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


def joined(parts: list[Extension]) -> Extension:
    return Extension(
        JOINED,
        [source for part in parts for source in part.sources],
        depends=parts[0].depends,
        py_limited_api=ABI3,
    )


try:
    from Cython.Build import cythonize
except ImportError:
    PARTS = extensions(".c")
else:
    PARTS = cythonize(extensions(".pyx"), build_dir="build/cython")  # the committed files stay

setup(
    ext_modules=[joined(PARTS)] if FOR_OTHERS else PARTS,
    cmdclass={"build_ext": Build},
    options={
        "build_ext": {"parallel": os.cpu_count()},  # files of equal size
        **({"bdist_wheel": {"py_limited_api": "cp310"}} if ABI3 else {}),
    },
)
