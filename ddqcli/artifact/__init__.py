"""The exported file: format, sizes, writer, reader and a decoder to copy. Needs numpy only."""
