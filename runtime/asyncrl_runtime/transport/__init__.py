"""JetStream: streams, tickets, acks, lease, ledger, audit. Nothing else in the runtime knows NATS."""
