"""Preconditioned weights: their state, their costs, their schedule, and stacks of several weights."""
