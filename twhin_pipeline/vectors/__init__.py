"""A trained model on disk, by original id: its files, the exported tables, and the read API."""
