"""Dynamics: what training does to margins, from closed forms to the user's own optimiser on frozen features."""
