"""The table of optimizers, and the settings that they run with."""
