"""Aurora-M's sources as tasks, and its two mixtures."""
