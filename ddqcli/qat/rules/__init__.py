"""How bits are decided, one rule a module."""
