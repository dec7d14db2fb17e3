"""Gets a method or an algorithm and raises AssertionError where it breaks its contract; never opens a model."""
