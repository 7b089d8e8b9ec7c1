"""How the project's files are read and written; imports nothing of ours but the facts."""
