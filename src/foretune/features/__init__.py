"""Features: how a pair's margin depends on the weights, and the hidden states that this is made of."""
