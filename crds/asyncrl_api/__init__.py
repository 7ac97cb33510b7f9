"""What operator, runtime and user share: AsyncRLJob types, RunConfig, names, user protocols."""
