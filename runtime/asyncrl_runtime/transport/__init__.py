"""NATS JetStream behind contract/broker.py: streams, tickets, acks, the lease. Nothing else knows NATS."""
