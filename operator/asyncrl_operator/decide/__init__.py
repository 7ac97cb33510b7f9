"""What is to be done about a job: plain values in, plain values out. Pure: no client of anything is imported."""
