"""`python -m gigatrain` is `gigatrain`."""

from gigatrain.cli import main

if __name__ == "__main__":
    main()
