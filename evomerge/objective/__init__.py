"""Gets per-item scores and gives fitness, race decisions and comparisons; never models, genomes or history."""
