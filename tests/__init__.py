"""Tests; a package so that `tests.reference` can be imported."""
