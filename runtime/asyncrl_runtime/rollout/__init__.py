"""The worker: pulls tickets, runs workflows on its engine, scores, publishes prompt groups."""
