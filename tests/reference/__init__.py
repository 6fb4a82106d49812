"""Slow, obvious twins of what the library computes fast: the oracles of the tests."""
