"""Loops compiled for the CPU. Nothing here knows what an edge means."""
