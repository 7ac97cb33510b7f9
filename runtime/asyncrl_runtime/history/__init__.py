"""The job's history: who writes the ledger, and what proves it. Knows no NATS."""
