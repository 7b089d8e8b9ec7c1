"""The corpora that come with the project, as tasks."""
