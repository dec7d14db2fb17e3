"""Gets task names and gives tasks with items, metrics and requests; never asks a model."""
