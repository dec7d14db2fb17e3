"""Get a proposal and give its outcome, here or elsewhere; never know each other's state, the problem or the run."""
