"""The loop: optimizer steps, stages, checkpoints and what is told of them."""
