"""`ssgen bench selfgen`: the self-generation sampler against sequential sampling, TRL and DeepSpeed, rows S1 to S6.

work.py      model, requests and prompts        baselines.py  token by token, what every peer does
single.py    S1, S2, S3, S6: one process        peers.py      TRL and DeepSpeed's rollout engine, as shipped
ranks.py     S4, S5: two ranks, ZeRO-3          ours.py       the only place that knows the sampler's interface
worker.py    runs rows in processes of their own
table.py     results file, Markdown table, plot
"""
