"""Jobs: their real processes, what a bystander sees of them, and what they are compared with."""
