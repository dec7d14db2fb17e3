"""Gets the history and gives children, gradient steps and draws of the default search; never sees a model or a file."""
