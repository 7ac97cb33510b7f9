"""What rank 0 keeps account of: tickets, arrived groups, staleness, checkpoints. Decisions are pure."""
