"""Internal: sockets on one side of a region joined with sockets on the other.

Each connection of a socket is a connection of a channel of bytes. The kernel copies from the socket
into the region's memory, and from there to the socket; this process has no buffer between.
"""
