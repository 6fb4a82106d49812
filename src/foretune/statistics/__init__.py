"""Statistics of a behaviour: moments, distinguishability, priority; every estimate with its uncertainty."""
