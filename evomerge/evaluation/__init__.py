"""Gets a live model and items and gives per-item scores, lm-eval's numbers; never knows a recipe, plan or genome."""
