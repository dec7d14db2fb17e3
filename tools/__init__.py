"""Makes what ships with EvoMerge; not part of the package."""
