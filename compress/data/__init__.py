"""Tokens and examples, with digests."""
