"""The explorer: pages on which people look at entities, their vectors, recommendations, releases and maps."""
