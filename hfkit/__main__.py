"""`python -m hfkit`, which also makes `accelerate launch -m hfkit` and `torchrun -m hfkit` work."""

from hfkit.cli.app import main

if __name__ == "__main__":
    main()
