"""`actuary compare`: variants A/B under load, with what the cost of each is known to be.

design.py     arms and seeds              -> the order of visits, and what each sends
workloads.py  files                       -> requests
driver.py     design and workload         -> rounds of blocks, through Locust (generator.py, locustfile.py)
store.py      rounds                      -> the run folder, and back
statistics.py, verdict.py  blocks         -> what is slower, faster, equivalent, inconclusive
report.py     verdict, blocks and samples -> one page
"""
