"""Messages, made in a line."""
