"""Weights, runs and files looked at: rows and statistics, then figures of them, then pages."""
