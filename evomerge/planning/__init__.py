"""Gets a recipe and open checkpoints and gives a plan; never computes a tensor of the result."""
