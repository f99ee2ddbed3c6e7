"""From files to batches: formats, prompts, mixing, collation."""
