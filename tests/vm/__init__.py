"""Tests that boot real guests.

A package, so that its modules find each other by relative import in each of pytest's import modes.
"""
