"""Many methods on the same data: cells that are trained and measured once, and one results file."""
