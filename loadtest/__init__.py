"""Load on a running service, over HTTP only: Locust sends it, raw samples come back, a report is drawn.

`cli.py` is the verb `actuary load`; `locustfile.py` also runs by itself under `locust -f`.
Nothing here imports models, export or service.
"""
