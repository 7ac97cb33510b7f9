"""What crosses a process: messages and their wire format. No torch, no NATS."""
