"""What crosses a process boundary: messages and their wire format. Imports neither torch nor NATS."""
