"""Rows T1 to T4: whole training steps beside TRL's SFTTrainer, what BSS adds, utilisation of a GPU, and growth.

ssgen bench train [--rows T1,T2] [--json]
"""
