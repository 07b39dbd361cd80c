"""The streaming sweep over the blocks of a model."""
