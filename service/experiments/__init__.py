"""Live A/B in the service: an experiment's name as `model` splits traffic between variants, sticky by a key.

definition.py   what an experiment is, checked; which arm a key has
live.py         those that run here; the service's one door to all of this
exposure.py     one request that an experiment answers: its arm, its times, its rows
outcomes.py     rows kept for a while, so that the token that really came gives an exact log loss
shadow.py       a copy of the traffic to variants that never answer
recorder.py     a bounded queue and the one thread that writes it
database.py     SQLite or PostgreSQL, opened: tables.py, migrations/
store.py        records in, sums out
retention.py    what leaves the database, and changes no verdict
confidence.py   sums to sequentially valid intervals
verdict.py      sums to the answer of GET /v1/experiments/NAME
routes.py       HTTP
"""
