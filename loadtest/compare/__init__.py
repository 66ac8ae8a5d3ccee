"""`actuary compare`: variants under load in blocks that stand close together, judged with statistics.

design.py      arms and seeds            -> the order of visits, and what each sends
workloads.py   requests                  -> bodies; prompts.py makes them from files
driver.py      design and workload       -> rounds of blocks, by Locust (generator.py, locustfile.py, wire.py)
store.py       rounds                    -> the run folder, and back
statistics.py  blocks                    -> ratios and their intervals; verdict.py says what they mean
report.py      run and verdict           -> a page, and its Markdown twin (words.py, charts.py, frontier.py)
against.py     two runs                  -> what changed from one to the other
cli.py         all of it in turn; options.py, server.py, terminal.py
"""
