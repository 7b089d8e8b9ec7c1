"""From text to batches: vocabularies, SeqIO tasks and mixtures, the token store, and the loader.

Nothing is imported here: `seqio` pulls TensorFlow in (seconds), and only `vocabulary` and `tasks` need it.
"""
