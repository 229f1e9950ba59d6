"""Recording, beside the library mcap alone: `python -m bench.recordings`."""
