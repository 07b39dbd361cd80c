"""Rounders: float weights in, integers with scales out. One method a file."""
