"""`python -m ddqcli` is `ddq`."""

from ddqcli.cli.app import main

if __name__ == "__main__":
    main()
