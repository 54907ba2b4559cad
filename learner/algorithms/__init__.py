"""Losses and advantages: pure functions, tensors in, (loss, sums) out. One idea a file.

    advantages, gae     how much better than expected an answer, or a token, was
    ratios              how much likelier one policy makes a token than another
    surrogates          the objective of one token, with its bounds
    corrections         weights and masks for tokens that another policy sampled
    aggregation         what each token counts for in the loss of a step
    divergence          distance to a reference policy
    filters             what becomes of rewards before they are compared
    health              what is reported of a step
    policy_gradient     the above, composed; recipe.py has the presets
    preference, rewards, values, sft     the other losses

S   sampled tokens of one packed row, whichever trajectories they belong to
N   trajectories, or sequences, of one row
G   trajectories of one group

What is reported is returned as *sums* and *maxima* over the row's tokens, under names
that end in `_sum` and `_max`, so that rows, ranks and accumulation add up to the step;
`sums.py` adds them and turns them into means. Every loss is a row's share of the loss
of the whole update: its normaliser is a count over all rows and ranks, so that packing,
ranks and accumulation change nothing.
"""
