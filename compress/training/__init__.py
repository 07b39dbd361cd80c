"""The one optimisation loop: steps, evaluation on held-out text, checkpoints, and what comes out."""
