"""The `ddq` command line: options in, result on stdout, exit code out."""
