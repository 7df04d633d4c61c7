"""What a training step costs: time by phase and memory of our optimizers, AdamW and installed peers, side by side."""
