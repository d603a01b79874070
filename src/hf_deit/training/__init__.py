"""Training runs: options, trainer, checkpoints, health checks, model card and uploads to the Hub."""
