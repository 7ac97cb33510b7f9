"""What the operator, the runtime and users share: AsyncRLJob types, RunConfig, names, user protocols."""
