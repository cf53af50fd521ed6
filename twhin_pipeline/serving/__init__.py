"""The vectors over HTTP: the service, and the explorer for people."""
