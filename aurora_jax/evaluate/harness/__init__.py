"""EleutherAI's lm-evaluation-harness (the extra `eval`), with our models.

Importing it takes seconds: only who evaluates pays for it.
"""
