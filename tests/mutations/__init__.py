"""Faults that the code could have, and the proof that the tests find them: `make mutations`."""
