"""`python -m ddqcli` is `ddq`."""

from ddqcli.cli import main

if __name__ == "__main__":
    main()
