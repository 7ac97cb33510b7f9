"""The CPU engine: SGLang's native HTTP API over a Hugging Face model."""
