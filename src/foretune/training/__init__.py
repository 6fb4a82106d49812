"""Real training with TRL: a DPOTrainer that knows behaviours, and a callback for any other trainer."""
