"""Passes that take weights away: single ones, patterns of them, or whole channels and heads."""
