"""The service `twhin serve`: what the current release knows, over HTTP."""
