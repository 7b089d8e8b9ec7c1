"""Texts and tokens: where documents come from, what is made of them, tokenizers."""
