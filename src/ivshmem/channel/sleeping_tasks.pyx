# cython: language_level=3, binding=True, freethreading_compatible=True
# cython: embedsignature=True, embedsignature.format=clinic
"""Internal: how the tasks of an asyncio loop wait at the ends of channels.

Knows: one watched descriptor for each loop and membership, and which tasks sleep. Does not know:
what an end waits for.

Invariants:
1. A task that was woken tries again by itself, and takes what it waits for at that moment. So a
   cancellation, a time limit or a close takes nothing from another task.
2. No task is resumed inside another: only the callbacks of descriptors and timers resume one
   directly; all others use call_soon.
"""

cimport cython
from cpython.object cimport PyObject, PyTypeObject
from cpython.ref cimport Py_INCREF

from ..native.syscalls cimport IVSHMEM_CLOSING, ivshmem_state
from .ends cimport FUTILE, LAST_PAUSE, ChannelEnd, Wakeup
from .membership cimport Membership

import weakref

from ..errors import ClosedError
from ..system.time_limits import seconds_of

cdef extern from *:
    """
    #ifdef IVSHMEM_LIMITED_API
    typedef PySendResult (*sendfunc)(PyObject *, PyObject *, PyObject **);
    #endif
    /* Cython has no name for this method of a type. */
    static inline void ivshmem_set_send(PyTypeObject *type, sendfunc send)
    {
    #ifdef IVSHMEM_LIMITED_API
        (void)type; (void)send;
    #else
        type->tp_as_async->am_send = send;
    #endif
    }
    """
    ctypedef enum PySendResult:
        PYGEN_RETURN
        PYGEN_ERROR
        PYGEN_NEXT
    ctypedef PySendResult (*sendfunc)(
        object waiting, object value, PyObject **result
    ) except PYGEN_ERROR
    void ivshmem_set_send(PyTypeObject *type, sendfunc send)

cdef object get_running_loop = None
cdef object CancelledError = None

# In the place of a result: there is none yet.
cdef object ABSENT = object()

cdef tuple DO_NOT_WAIT = (0,)
cdef tuple ABSENT_AND_DO_NOT_WAIT = (ABSENT, 0)

# What comes just before a sleep is taken at once. A hostile peer can say again and again that there
# is something: after so many looks other tasks have their turn.
cdef enum:
    LOOKS = 3


cdef int import_asyncio() except -1:
    """Find what is used of asyncio, at the first wait that uses it.

    To import asyncio takes half of the time to import channels, and a program that does not use it
    goes without.
    """
    global get_running_loop, CancelledError
    import asyncio  # here, for that reason

    CancelledError = asyncio.CancelledError
    get_running_loop = asyncio.get_running_loop
    return 0


@cython.final
cdef class LoopWatch:
    """What a loop watches for one membership: its descriptor, at most once without a waiter.

    To watch it for each sleep anew costs more than all else that a sleep costs.
    """

    cdef object __weakref__
    cdef object loop  # a weak reference
    cdef Membership membership
    cdef Wakeup wakeup
    cdef bint watched
    cdef dict sleeps  # Sleep -> None, the longest first

    def __cinit__(self, loop, Membership membership not None):
        self.loop = weakref.ref(loop)
        self.membership = membership
        self.wakeup = Wakeup(membership)
        self.sleeps = {}

    def __reduce__(self):
        raise TypeError("a LoopWatch cannot be copied or pickled")

    cdef int add(self, Sleep sleep) except -1:
        if not self.watched:
            sleep._loop.add_reader(self.wakeup.epoll.epfd, self.wake)
            self.watched = True
        self.sleeps[sleep] = None
        return 0

    @cython.binding(False)
    def wake(self):
        """Resume the tasks that have something at their ends."""
        cdef Sleep sleep
        cdef Py_ssize_t i
        cdef list found = list(self.sleeps)  # those that run change it
        self.wakeup.clear()
        if not found or ivshmem_state(&self.membership.state) & IVSHMEM_CLOSING:
            self.loop().remove_reader(self.wakeup.epoll.epfd)
            self.watched = False
        for i in range(len(found)):
            sleep = found[i]
            try:
                if sleep.callback is not None and not sleep.end.sleeps_on():
                    sleep.resume()
            except BaseException:  # KeyboardInterrupt and SystemExit leave the task's step
                loop = self.loop()
                for other in found[i + 1:]:
                    loop.call_soon(other.expire)
                raise


cdef LoopWatch watch_of(ChannelEnd end, object loop):
    """Return what a loop watches for an end; the end remembers it."""
    cdef LoopWatch watch = None
    cdef ChannelEnd sleeper = end.sleeper()
    with cython.critical_section(sleeper):
        if sleeper.watch is not None:
            watch = sleeper.watch()
        if watch is None or watch.loop() is not loop:
            watch = new_watch_of(sleeper.membership, loop)
            sleeper.watch = weakref.ref(watch)
    return watch


cdef LoopWatch new_watch_of(Membership membership, object loop):
    cdef object loops = membership.loops
    if loops is None:
        raise ClosedError("the channels are closed")
    watch = loops.get(loop)
    if watch is None:
        # A loop that was closed while tasks slept is kept by them: without this, their ends were
        # never closed.
        for former in loops.keyrefs():
            other = former()
            if other is not None and other.is_closed():
                loops.pop(other, None)
        watch = loops[loop] = LoopWatch(loop, membership)
    return watch


@cython.final
@cython.freelist(8)
cdef class Sleep:
    """What a task sleeps on: the part of a future that asyncio.Task uses.

    A future wakes its task by call_soon. That takes one more turn of the loop with another select,
    which costs about as much as all the rest. A Sleep is private to one task, so its callback can
    be called directly where no task is running.
    """

    cdef ChannelEnd end
    cdef LoopWatch watch  # None: a pause, which only its timer ends
    cdef object timer
    cdef object callback  # the task's; None: no task sleeps on this, or it is woken
    cdef object context
    cdef object error
    cdef readonly object _loop
    cdef public bint _asyncio_future_blocking  # tells the task that this was awaited

    def __init__(self, *args, **kwargs):
        raise TypeError("a Sleep is made by a Waiting")

    def __reduce__(self):
        raise TypeError("a Sleep cannot be copied or pickled")

    cdef int end_now(self) except -1:
        self.callback = None
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        if self.watch is not None:
            self.watch.sleeps.pop(self, None)
            self.end.end_waiting()
        return 0

    # Called by the task.

    @cython.binding(False)
    def add_done_callback(self, callback, *, context):
        """Call it at the end of the sleep."""
        self.callback = callback
        self.context = context

    def cancel(self, msg=None):
        """Raise CancelledError in the task; False: it was woken before."""
        callback = self.callback
        if callback is None:
            return False
        self.callback = None
        self.error = CancelledError() if msg is None else CancelledError(msg)
        self._loop.call_soon(callback, self, context=self.context)
        return True

    @cython.binding(False)
    def result(self):
        """Raise what `cancel` set."""
        cdef object error = self.error
        if error is not None:
            self.error = None  # else its traceback would refer to itself
            raise error

    # Called by the loop.

    cdef int resume(self) except -1:
        """Let the task continue at once; return when it waits for something else."""
        callback = self.callback
        self.callback = None
        self.context.run(callback, self)
        return 0

    def expire(self):
        """End the sleep, if it has not ended."""
        if self.callback is not None:
            self.resume()


cdef Sleep sleep_at(ChannelEnd end, object loop, object deadline):
    """Begin to sleep at an end; None: there is something already."""
    cdef Sleep sleep
    if end.begin_waiting():
        end.end_waiting()
        return None
    sleep = Sleep.__new__(Sleep)
    try:
        sleep.end = end
        sleep._loop = loop
        sleep.watch = watch_of(end, loop)
        if deadline is not None:
            sleep.timer = loop.call_at(deadline, sleep.expire)
        sleep.watch.add(sleep)
    except BaseException:
        end.end_waiting()
        raise
    sleep._asyncio_future_blocking = True
    return sleep


cdef Sleep pause(object loop, object deadline):
    """Begin to sleep until the next look, whatever the memory says."""
    cdef Sleep sleep = Sleep.__new__(Sleep)
    cdef object until = loop.time() + LAST_PAUSE / 1e9
    sleep._loop = loop
    sleep.timer = loop.call_at(until if deadline is None else min(until, deadline), sleep.expire)
    sleep._asyncio_future_blocking = True
    return sleep


cdef enum:
    NEW, SUSPENDED, OVER  # the state of a Waiting


# No freelist: an object that comes from there is never finalized again.
@cython.final
cdef class Waiting:
    """A call that is made again until it succeeds, or the time is over; between, its task sleeps.

    It is a coroutine in C: a wait needs no frame of Python.
    """

    cdef ChannelEnd end
    cdef object call
    cdef tuple arguments
    cdef dict options
    cdef object failure  # the exception that says that it is not there yet; None: `absent` does
    cdef object absent  # the result that says so: None, or ABSENT
    cdef str name  # of the method that a program called; None: the name of `call`
    cdef object timeout  # seconds, or None
    cdef object loop
    cdef object deadline  # by the loop's clock, or None
    cdef int state
    cdef int futile  # looks that found nothing, although the memory said that there is something
    cdef Sleep sleep  # while its task sleeps

    def __init__(self, *args, **kwargs):
        raise TypeError("a Waiting is made by an end of a channel")

    def __reduce__(self):
        raise TypeError("a Waiting cannot be copied or pickled")

    @property
    def __name__(self):
        return self.call.__name__ if self.name is None else self.name

    @property
    def __qualname__(self):
        return f"{type(self.end).__name__}.{self.__name__}"

    def __await__(self):
        return self

    def __next__(self):
        return self.send(None)

    def send(self, value):
        """Begin, or continue when the task runs again."""
        found = self.step()
        if self.state == OVER:
            raise StopIteration(found)
        return found

    @cython.binding(False)
    def throw(self, kind, value=None, traceback=None):
        """End the wait by an exception."""
        self.close()
        if value is None:
            value = kind() if isinstance(kind, type) else kind
        elif not isinstance(value, BaseException):
            value = kind(value)
        raise value if traceback is None else value.with_traceback(traceback)

    def close(self):
        """End the wait."""
        cdef ChannelEnd end
        cdef bint slept = self.sleep is not None
        self.state = OVER
        self.awake()
        if slept:  # perhaps it was rung, and takes nothing now
            end = self.end.sleeper()
            with cython.critical_section(end):
                if end.usable():
                    end.pass_on()

    def __del__(self):
        self.awake()  # a task that was forgotten, with its loop

    cdef object step(self):
        """Look; return the result if it is OVER now, or else what the task is to sleep on."""
        cdef int state = self.state
        self.state = OVER
        if state == NEW:
            if self.timeout is not None:
                self.find_loop()
                self.deadline = self.loop.time() + seconds_of(self.timeout)
        elif state == OVER:
            raise RuntimeError("cannot reuse already awaited coroutine")
        else:
            self.awake()
        for _ in range(LOOKS):
            found = self.look()
            if found is not ABSENT:
                return found
            if self.loop is None:
                self.find_loop()
            self.sleep = sleep_at(self.end, self.loop, self.deadline)
            if self.sleep is None:
                self.futile += 1
                if self.futile > FUTILE:
                    self.sleep = pause(self.loop, self.deadline)
            if self.sleep is not None:
                break
        self.state = SUSPENDED
        return self.sleep  # None lets other tasks run

    cdef int find_loop(self) except -1:
        if get_running_loop is None:
            import_asyncio()
        self.loop = get_running_loop()
        return 0

    cdef bint is_late(self) except -1:
        return self.deadline is not None and self.loop.time() >= self.deadline

    cdef object look(self):
        """Return what the call returns: None if the time is over; ABSENT: wait."""
        if self.failure is None:
            found = self.call(*self.arguments)
            if found is not self.absent:
                return found
            return None if self.is_late() else ABSENT
        try:
            if self.options is None:
                return self.call(*self.arguments)
            return self.call(*self.arguments, **self.options)
        except self.failure:
            if not self.is_late():
                return ABSENT
            if self.failure is TimeoutError:
                raise
        raise TimeoutError(
            f"connection of {self.end.name!r}: nothing moved in {self.timeout:g} s"
        )

    cdef int awake(self) except -1:
        cdef Sleep sleep = self.sleep
        if sleep is not None:
            self.sleep = None
            sleep.end_now()
        return 0


cdef PySendResult send_to_waiting(
    object waiting, object value, PyObject **result
) except PYGEN_ERROR:
    """Do what `send` does, for a task: without a StopIteration and its traceback."""
    cdef object found = (<Waiting>waiting).step()
    Py_INCREF(found)
    result[0] = <PyObject *>found
    return PYGEN_RETURN if (<Waiting>waiting).state == OVER else PYGEN_NEXT


ivshmem_set_send(<PyTypeObject *>Waiting, send_to_waiting)


cdef Waiting waiting_for(ChannelEnd end, object call, object timeout, tuple arguments):
    cdef Waiting waiting = Waiting.__new__(Waiting)
    waiting.end = end
    waiting.call = call
    waiting.timeout = timeout
    waiting.arguments = arguments
    return waiting


cdef object until_something(ChannelEnd end, object call, object timeout, tuple arguments):
    """Return a coroutine that calls until the result is not None, or the time is over.

    Args:
        call: takes `arguments`, and after them a time limit: 0, with which it does not wait.
    """
    return waiting_for(end, call, timeout, arguments + DO_NOT_WAIT if arguments else DO_NOT_WAIT)


cdef object until_content(ChannelEnd end, str name, object call, object timeout):
    """Return a coroutine that calls until there is a content, which can be None: see pickled.py.

    Args:
        name: of what a program called.
        call: takes what it returns if there is none, and a time limit: 0.
    """
    cdef Waiting waiting = waiting_for(end, call, timeout, ABSENT_AND_DO_NOT_WAIT)
    waiting.absent = ABSENT
    waiting.name = name
    return waiting


cdef object until_in_time(
    ChannelEnd end, object call, object timeout, tuple arguments, dict options=None
):
    """The same until it does not raise TimeoutError, or the time is over, which raises it."""
    cdef Waiting waiting = waiting_for(end, call, timeout, arguments + DO_NOT_WAIT)
    waiting.options = options
    waiting.failure = TimeoutError
    return waiting


cdef object until_no_wait(ChannelEnd end, object call, object timeout, tuple arguments):
    """The same until it does not raise BlockingIOError; TimeoutError if the time is over.

    Args:
        call: takes `arguments`, and never waits.
    """
    cdef Waiting waiting = waiting_for(end, call, timeout, arguments)
    waiting.failure = BlockingIOError
    return waiting
