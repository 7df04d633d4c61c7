"""Which process holds which layer, and what processes send and save for it."""
