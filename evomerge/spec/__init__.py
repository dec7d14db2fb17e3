"""Gets a search.yaml and gives a frozen SearchSpec; never opens a model, never knows an algorithm."""
