"""The CPU engine, which serves a Hugging Face model over SGLang's native HTTP API."""
