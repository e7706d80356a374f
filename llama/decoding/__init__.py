"""Ids in, ids out: who runs, one step of the model over its cache, that step as one graph, and what is chosen."""
