"""TwHIN: entity embeddings from typed edges. Everything here works without Dagster."""
