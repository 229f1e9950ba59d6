"""What messages cost, beside C and other libraries: `python -m bench.channels`.

exchange.py is one way to pass messages between two processes; ours.py, in_c.py and peers.py have
those ways. loops.py measures in event loops, local.py in one process, readers.py with many readers,
system_calls.py and geometries.py count. tables.py says which rows belong together.
"""
