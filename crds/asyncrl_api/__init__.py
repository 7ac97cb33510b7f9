"""What the operator, the runtime and users share: AsyncRLJob types, RunConfig, names, user protocols."""

__version__ = "0.1.0"
"""The version of everything here. Chart.yaml has it written by hand; a test holds the two equal."""
