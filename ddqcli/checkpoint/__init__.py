"""Reading the files in which others keep weights, and building their networks."""
