"""Types and contracts that every room shares; nothing here imports torch."""
