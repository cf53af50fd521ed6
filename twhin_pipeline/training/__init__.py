"""The loop: launch, data, steps, validation, checkpoints, tracking."""
