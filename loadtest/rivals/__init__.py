"""The engines that ours is measured against: one small server each, run as a program in an environment of its own.

Nothing imports these files: `loadtest/bench/` starts them by path with the Python of their environment, and `to_*.py`
and `reference.py` with a Python that can convert. They import nothing of ours but each other.
"""
