"""What is known of weights, runs and files: rows, then figures of them, then pages."""
