"""Preconditioned weights: what is known of one, what it costs, when it has its turn, and how several go together."""
