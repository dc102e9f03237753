"""Drawings, questions, tokenizer and training loop for the tiny models under examples/."""
