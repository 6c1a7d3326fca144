"""`python -m hfkit`, and so `accelerate launch -m hfkit` and `torchrun -m hfkit`."""

from hfkit.cli.app import main

if __name__ == "__main__":
    main()
