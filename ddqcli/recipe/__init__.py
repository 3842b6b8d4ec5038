"""The recipe: everything a run can be told. schema.py is the list of fields with their defaults."""
