"""What the operator, the runtime and the user share: the AsyncRLJob types, RunConfig, names, user protocols."""
