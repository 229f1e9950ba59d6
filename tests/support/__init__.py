"""What several tests share: fake peers and servers, child processes, signals, limits.

Reached as `support.x` through `pythonpath = ["tests"]` in pyproject.toml.
"""
