"""A snapshot's edges and entities: sources are read, typed and merged, and entities get rows."""
