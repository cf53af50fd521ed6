"""The Dagster side: a module for each stage's assets, and one for each concept of Dagster that they share."""
