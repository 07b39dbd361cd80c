"""One paired experiment, before and after."""
