"""The table of optimizers, and their settings."""
