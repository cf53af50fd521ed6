"""A snapshot's edges and entities: sources are read, typed, merged and numbered."""
