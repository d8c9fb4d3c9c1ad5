"""Vocabulary, tokenizers and prompts of language models."""
