"""Takes a search specification and gives outcomes of proposals; never knows run folders, records or algorithms."""
