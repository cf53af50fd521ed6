"""Day after day: what changed between releases, and which one consumers see."""
