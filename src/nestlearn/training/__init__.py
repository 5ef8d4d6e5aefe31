"""Training: data, the loop, checkpoints, several processes."""
