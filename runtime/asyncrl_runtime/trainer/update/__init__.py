"""What every rank does: one training step, from a batch of prompt groups to a new policy version."""
