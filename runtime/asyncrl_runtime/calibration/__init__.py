"""Makes a device model from a run and from an engine, for `asyncrl calibrate`."""
