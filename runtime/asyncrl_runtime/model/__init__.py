"""The policy's files and its forward pass: sources, tokenizer, attention over segments."""
