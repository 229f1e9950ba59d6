"""What the ends of each kind use of sleeping_tasks.pyx."""

from .ends cimport ChannelEnd

cdef object until_something(ChannelEnd end, object call, object timeout, tuple arguments)
cdef object until_content(ChannelEnd end, str name, object call, object timeout)
cdef object until_in_time(
    ChannelEnd end, object call, object timeout, tuple arguments, dict options=*
)
cdef object until_no_wait(ChannelEnd end, object call, object timeout, tuple arguments)
