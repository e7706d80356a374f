"""Ids in, ids out: who runs, one step of the model over its cache, that step as one graph, and what is chosen.

Words:
    call     requests that were made together           slot  a row of the cache; rows move between slots
    request  a prompt of ids, and how it is answered    lane  which row of its call's noise a row draws with
    row      a request that runs                        step  one pass of the model, and what it decides for a row
"""
