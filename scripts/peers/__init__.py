"""Other quantizers, fed with the graphs and the data that vlmport's own is fed with."""
