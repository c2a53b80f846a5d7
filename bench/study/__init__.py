"""`make study-controlled`: small models trained from scratch on tasks where one wrong token spoils what follows.

tasks.py       the tasks, their data files, tokenizer and fresh models     measure.py     one trained model, in numbers
settings.py    how much of everything; the list of runs                   intervals.py   means over seeds, intervals
worker.py      runs, one after the other, in one process group            summary.py     results file, plots, document
run.py         the command: two workers share the list
"""
