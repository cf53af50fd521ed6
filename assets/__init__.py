"""Dagster assets, one thin module a stage."""
