"""What is to be done about a job: plain values in, plain values out. Pure: imports no client of anything."""
