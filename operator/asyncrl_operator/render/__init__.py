"""From an AsyncRLJob to the objects and files that it is made of. Pure: no client of anything is imported."""
