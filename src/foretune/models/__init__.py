"""Models and tokenizers: loading, encoding, batches, the output layer."""
