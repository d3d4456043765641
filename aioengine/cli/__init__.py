"""The command line: one file for each command, none of which imports torch before it runs."""
