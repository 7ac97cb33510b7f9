"""The job's history: the writer of the ledger, and the audit that proves it. Neither knows NATS."""
