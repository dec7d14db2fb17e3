"""Gets chunks of tensors and gives merged elements or counts, compiled for the processor; never opens a file."""
