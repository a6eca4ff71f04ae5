"""What happens to files when a process is killed, a disk is full, a byte flips, two run at once.

`make test` runs a short selection, `make faults` the long one: python -m tests.faults.
"""
