"""For people: summaries, tables, plots."""
