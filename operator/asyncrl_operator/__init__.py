"""Plans an AsyncRLJob and executes the plan: as objects of a cluster, or as processes of this machine."""
