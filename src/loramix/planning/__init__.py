"""What a training will cost, worked out before it begins."""
