"""Takes the arguments of a command and gives its result as a value; never prints, and never picks the tracker."""
