"""Gets a specification and gives a search space, and of a genome its recipe; never opens a model or sees a score."""
