"""`penstock train sft|dpo|rm RUN.toml`: the offline algorithms, which need no actors.

The same policy, rows, ranks and optimiser as a run's trainer; only the objective and
where sequences come from differ.
"""
