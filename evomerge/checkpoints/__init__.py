"""Gets a model reference and gives an open `Checkpoint`; writes one. Never knows recipes, plans or genomes."""
