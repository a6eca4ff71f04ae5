"""Fuzzing of the ops: random hostile calls against an oracle in numpy, and crashes with their seed.

    python -m tests.fuzz [--rows N] [--calls M] [--seed S] [--isa LEVEL | --emulated]

`oracle.py` says what is right and shares no code with fastsae or its reference; `inputs.py` makes
rows that selections get wrong; `checks.py` makes one call from its seed and compares; `driver.py`
runs calls in a process of their own and says which one ended it.
"""
