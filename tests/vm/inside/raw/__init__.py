"""The ivshmem device driven from inside a guest by nothing but the standard library.

The tests' own yardstick: small enough to be right by reading, and independent of the package.
"""
