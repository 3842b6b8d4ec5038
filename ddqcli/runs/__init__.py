"""The run folder: names.py lists its files, folder.py makes it, find.py finds it, run.py reads and
writes it."""
