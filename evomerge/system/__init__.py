"""Gets files, locks, threads and hashes to the packages above, in one way each; knows nothing of merging."""
