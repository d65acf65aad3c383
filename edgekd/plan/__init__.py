"""Which student fits a latency budget: untrained candidates measured on the very device, recipes for the largest ones."""
