"""JetStream: streams, tickets, acks, the lease. Nothing else in the runtime knows NATS."""
