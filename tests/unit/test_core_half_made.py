"""Objects of the Cython modules that a constructor never finished, or that nobody initialized.

Whatever is called on one: no crash, no error from a finalizer, no second traceback. It runs in a
process of its own, which a crash would end.
"""

from __future__ import annotations

from support.children import python

PROGRAM = """
    import faulthandler, gc, inspect, sys
    import ivshmem, ivshmem.aio, ivshmem.guest
    from ivshmem.native import bell, descriptors, mapping, spin, wire
    from ivshmem import _core

    faulthandler.enable()
    complaints = []
    sys.unraisablehook = lambda what: complaints.append((what.object, what.exc_value))
    # What waits without a limit, or is not a method of an object.
    LEFT_OUT = {"wait", "_wait_event", "wait_word", "echo", "events", "next_event", "__init__",
                "__class__", "__init_subclass__", "__subclasshook__", "__new__"}
    ARGUMENTS = [(), (0,), (-1,), (1 << 40,), ("x",), (None,), (0, 0), (0, None), (0, 0, 0)]

    class Sub(_core.Doorbells):
        pass

    classes = {
        value
        for module in (bell, _core, descriptors, mapping, spin, wire)
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module.__name__
    } | {Sub, ivshmem.Client, ivshmem.Region, ivshmem.aio.AsyncEndpoint, ivshmem.Directory}
    tried = 0
    for cls in sorted(classes, key=lambda cls: cls.__name__):
        for arguments in ARGUMENTS:
            try:
                cls(*arguments)  # the wrong ones, mostly
            except Exception:
                pass
            try:
                thing = cls.__new__(cls, *arguments)
            except Exception:
                continue
            for name in dir(thing):
                if name in LEFT_OUT:
                    continue
                try:
                    call = getattr(thing, name)
                except Exception:
                    continue
                if callable(call):
                    for args in ARGUMENTS:
                        tried += 1
                        try:
                            result = call(*args)
                            if inspect.iscoroutine(result):
                                result.close()
                        except Exception:
                            pass
            for use in (repr, str, len, bool, memoryview, list, hash):
                try:
                    use(thing)
                except Exception:
                    pass
            del thing
        gc.collect()
    print(len(classes) > 15, tried > 1000, complaints, flush=True)
"""


def test_half_made_objects_crash_nobody() -> None:
    with python(PROGRAM) as child:
        assert child.line() == "True True []"
        _, errors = child.process.communicate(timeout=60)
        assert not errors
        assert child.process.returncode == 0
