"""`actuary compare` from the page: started as a child process, watched and read through files alone.

request.py   what may be asked of one, and the command that it becomes
runs.py      DIR/ID/*.json, of this service's and of others' comparisons, as answers
live.py      the one that runs: started, stopped, ended with the service
routes.py    HTTP
"""
