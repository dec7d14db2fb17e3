"""A merge method and a search algorithm for EvoMerge."""
