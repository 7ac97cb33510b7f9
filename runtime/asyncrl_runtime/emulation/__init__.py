"""Emulated devices: engines and trainers that take the time that a device model says, and compute nothing."""
