"""The command line: one file per command, all output through one sink."""
