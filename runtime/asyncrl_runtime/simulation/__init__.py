"""The whole runtime in one process, in virtual time, over emulated devices and a broker in memory."""
