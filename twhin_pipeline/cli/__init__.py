"""The command `twhin`: one module for each group of commands.

Importing it must stay quick: what is slow to import, each command imports itself.
"""

from twhin_pipeline.cli.program import app, main, run_arguments

__all__ = ["app", "main", "run_arguments"]
