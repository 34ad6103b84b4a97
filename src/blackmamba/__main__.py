"""`python -m blackmamba`: the same program as `blackmamba`, as torchrun starts it."""

from blackmamba.cli.main import entry_point

if __name__ == "__main__":
    entry_point()
