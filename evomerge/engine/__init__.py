"""Gets a plan and gives weights, on disk or in memory; never sees a recipe, a genome or a score."""
