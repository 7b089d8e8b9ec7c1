"""All that a run reads: which windows of which stores make the batch of a step."""
