"""Stage 2: traced graphs become the one form that all backends run."""
