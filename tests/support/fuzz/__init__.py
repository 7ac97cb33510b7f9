"""Foreign data for every parser: real messages, mutated, and what becomes of them."""
