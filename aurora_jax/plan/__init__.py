"""What can be known about a run on TPUs before one is rented."""
