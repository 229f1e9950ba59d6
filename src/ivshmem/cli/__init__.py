"""Internal: the command line: `python -m ivshmem SUBCOMMAND`, installed as `ivshmem` too.

stdout is for results, stderr for messages. Exit status 0: done; 1: failed, and one line
on stderr says why and what to do; 2: wrong usage.
"""
