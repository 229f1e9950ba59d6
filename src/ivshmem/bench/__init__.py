"""Internal: measuring doorbells and memory on the machine at hand.

Knows: round trips, percentiles, which core runs what. Does not know: what a good figure would be.
"""
