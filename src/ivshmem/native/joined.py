"""Internal: loads the compiled modules that a wheel has in one file.

Each module in Cython has the same functions of Cython's. In one file the linker keeps one of each,
and that file is a third smaller than a file for each module. setup.py makes it, and in the place of
each module a few lines in Python that call `load`. Builds for one machine have none of this.
"""

from __future__ import annotations

import sys
from importlib.machinery import ExtensionFileLoader
from importlib.util import find_spec, module_from_spec

FILE = "ivshmem.native._joined"


def load(name: str) -> None:
    """Put the compiled module in the place of the one that is being imported, and calls this.

    Raises:
        ImportError: the file is missing, or cannot be loaded.
    """
    # A guest kit has the file elsewhere, and finds it.
    found = find_spec(FILE)
    if found is None or found.origin is None:
        raise ImportError(f"no file with {name}: install ivshmem again", name=name)
    # The same object: other threads wait until it says that the import has ended.
    spec = sys.modules[name].__spec__
    assert spec is not None
    spec.loader = ExtensionFileLoader(name, found.origin)
    spec.origin = found.origin
    spec.cached = None
    module = module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
