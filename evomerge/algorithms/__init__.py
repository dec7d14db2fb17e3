"""Gets the history of a search and gives proposals, as pure functions; never sees a model, a file or an item."""
