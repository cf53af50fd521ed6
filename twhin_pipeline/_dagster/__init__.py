"""The Dagster side under a name of this package: links to the top-level folders `assets` and `resources`.

A wheel holds the folders themselves here, since packages called `assets` and `resources` would be anyone's. No code
belongs here, and nothing but `definitions.py` imports from here.
"""
