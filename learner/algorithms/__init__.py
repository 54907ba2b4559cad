"""Losses and advantages: pure functions, tensors in, (loss, sums) out.

S   sampled tokens of one packed row, whichever trajectories they belong to
G   trajectories of one group

What is reported is returned as *sums* and *maxima* over the row's tokens, under names
that end in `_sum` and `_max`, so that rows, ranks and accumulation add up to the step;
`sums.py` adds them and turns them into means.
"""
