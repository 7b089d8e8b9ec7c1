"""What keeps a run right and alive, and what it writes down when it is neither."""
