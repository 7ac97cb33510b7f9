"""Messages, each made in one line."""
