"""The second executor: `asyncrl run` and the rest of the command line. A laptop needs this and no cluster."""
