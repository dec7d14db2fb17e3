"""Gets proposals and outcomes and gives the recorded history; never knows an algorithm, an executor or torch."""
