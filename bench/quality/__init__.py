"""`make study-smollm2`: a real model on real data. SFT, BSS and RAC on the same examples, with intervals.

xsum.yaml      the recipe that all runs share      settings.py   the runs, and how much of everything
run.py         the command; resumable              table.py      results file and document
"""
