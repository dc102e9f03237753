"""One file for each way to run a bundle's graphs."""
