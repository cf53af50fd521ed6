"""How an edge is scored, and what a mistake costs."""
