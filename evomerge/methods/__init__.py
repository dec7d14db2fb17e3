"""Gets tensors and settings and gives a tensor, one method a file; never reads, writes or draws globally."""
