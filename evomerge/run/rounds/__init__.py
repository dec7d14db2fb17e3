"""Gets the candidates of a search's rounds so far and gives the sources of the next. Never: scores a model."""
