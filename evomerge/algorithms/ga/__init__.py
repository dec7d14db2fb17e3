"""Gets the history and gives children, steps by the Jacobian and draws of the default search; never sees a model."""
