"""`python -m blackmamba`: the same program as `blackmamba`, as torchrun starts it."""

from blackmamba_program import main

if __name__ == "__main__":
    main()
