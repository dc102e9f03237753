"""Stage 1: a checkpoint becomes traced graphs whose weights are still recipes."""
