"""Are told of a search's progress and show or send it; never open a run folder."""
