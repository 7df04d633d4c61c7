"""What runs at every step: statistics → refresh → momentum → precondition → norm control → weight decay and the step.

`statistics` takes and averages them and refreshes preconditioners; `second_order` goes through the weights;
`preconditioned` makes an update of a gradient; `norm_control` says how large it may be. `sharded` does the same for
weights of which a rank has a part, `fallback` for what is not preconditioned.
"""
