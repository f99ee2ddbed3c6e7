"""Adapter folders as files: read with suspicion, written whole. Nothing of a base is needed."""
