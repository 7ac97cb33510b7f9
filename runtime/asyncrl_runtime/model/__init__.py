"""The policy's files and its forward pass: sources, tokenizer, and attention over segments."""
