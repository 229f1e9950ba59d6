"""The channels' protocol as a model without I/O, and an explorer that tries every interleaving.

`operations` names the atomic steps, `automaton` makes one process of a generator, and `explorer`
runs several against one memory. The other modules are the protocol: one for each kind of channel.
"""
