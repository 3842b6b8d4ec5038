"""The exported file: its format, its writer and its decoder. Needs numpy only."""
