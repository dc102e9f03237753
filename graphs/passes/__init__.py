"""One graph pass for each file."""
