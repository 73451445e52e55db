"""Training: the loop, its schedule, metrics and checkpoints."""
