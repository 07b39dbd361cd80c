"""How compressed weights lie on disk."""
