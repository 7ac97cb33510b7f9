"""SGLang as the engine of a job."""
