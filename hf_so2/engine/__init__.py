"""What runs at every step: statistics → refresh → momentum → precondition → norm control → weight decay and the step.

`statistics` takes and averages the statistics and refreshes preconditioners. `second_order` goes through the weights.
`preconditioned` turns a gradient into an update. `norm_control` sets the size of an update. `sharded` does the same for
weights that are sharded over ranks, and `fallback` updates what is not preconditioned.
"""
