"""Takes options and prints what the commands of `evomerge.run` return; never does a command's work itself."""
