"""`actuary bench serve`: our server and the engines that others would pick, on the same weights, over HTTP.

setup.py      environments, weights, conversions       -> artifacts/bench-serve/
contenders.py who is measured, with which packages and settings: one table
workloads.py  what is asked of them: one table, and the bodies of the requests
servers.py    their processes: all up at once, all but one stopped
agreement.py  refuses to measure engines that do not say the same
client.py     one visit, from a process of its own
visits.py     rounds of visits, each kept as it is made, so that a killed run goes on
report.py     what was kept                            -> docs/benchmarks.md and its pictures
"""
