"""The run folder: names.py lists its files, folder.py finds it, run.py reads and writes it."""
