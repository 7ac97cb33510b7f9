"""What to do about a job: plain values in, plain values out. Pure: it imports no client of anything."""
