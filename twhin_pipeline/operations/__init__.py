"""Before and around a run: init, plan, doctor, tune, generate."""
