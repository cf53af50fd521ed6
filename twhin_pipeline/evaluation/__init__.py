"""How good a model is: ranking, metrics, baselines, and what to try."""
