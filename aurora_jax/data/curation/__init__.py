"""From raw documents to documents worth training on: filters, redaction, duplicates, decontamination, and a
report of what was done.

Nothing is imported here: `pipeline` pulls Apache Beam in (seconds), and only the run itself needs it.
"""
