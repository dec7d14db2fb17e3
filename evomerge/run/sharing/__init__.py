"""Gets a finished run or a model and hands it on in the shapes that others use; never searches."""
