"""Gets stored tensors and a device and gives what merging there takes, in torch alone; never merges itself."""
