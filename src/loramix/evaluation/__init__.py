"""Measuring: perplexity and routing."""
