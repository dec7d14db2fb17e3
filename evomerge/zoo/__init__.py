"""Gets the NAME of `zoo:NAME` and gives the folder of that tiny model, which ships with EvoMerge; never trains one."""
