"""Gets a live model and requests and gives its responses; never knows what a metric is."""
