"""Checkpoints of other formats and other models, to and from the framework's own. One tensor at a time."""
