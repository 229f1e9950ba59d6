"""Internal: what passes through channels, recorded in MCAP files, and replayed from them.

Its library is an extra: `pip install mcap`.
"""
