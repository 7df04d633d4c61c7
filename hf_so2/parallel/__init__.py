"""Who holds which layer among processes, and what is sent and saved for it."""
