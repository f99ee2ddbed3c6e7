"""States of a training on disk: written whole or not at all, checked before they are read, never pickled."""
