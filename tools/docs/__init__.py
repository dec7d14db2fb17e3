"""What `make docs` adds to the pages in docs/: the reference, from the code."""
