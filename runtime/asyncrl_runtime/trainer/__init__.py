"""The trainer: rank 0 is the controller, every rank updates the policy."""
