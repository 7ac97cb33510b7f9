"""Renders an AsyncRLJob as the objects and files it is made of. Pure: no client of anything is imported."""
