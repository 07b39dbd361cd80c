"""Hugging Face models: where their stacks are, names on disk, tasks."""
