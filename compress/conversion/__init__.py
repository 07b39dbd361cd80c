"""Rewriting an artifact into the format of another engine: integers move, nothing is rounded."""
