"""Gets the open models of a merge and gives them one naming and one set of tensors, or says what keeps them apart."""
