"""The command line: one file a command, each filling one options value and calling the API."""
