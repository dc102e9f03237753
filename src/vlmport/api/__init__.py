"""What the command line's verbs do, as functions."""
