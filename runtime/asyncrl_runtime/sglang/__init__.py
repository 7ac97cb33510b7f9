"""SGLang as a job's engine."""
