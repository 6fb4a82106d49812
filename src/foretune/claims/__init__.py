"""The paper's claims, shown again on any model and data: one module a claim, one `Study` that runs what they share."""
