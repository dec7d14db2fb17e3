"""Gets a resident model and requests and gives log-likelihoods, generated text and gradients; never loads a model."""
