"""Gets the tensors of a run and gives what methods ask of whole tensors, computed once; never merges."""
