"""The command line: one file per verb, each of them thin: parse, call, print."""
