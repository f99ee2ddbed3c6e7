"""Training: settings, trainer, stages."""
