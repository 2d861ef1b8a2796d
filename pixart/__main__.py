"""`python -m pixart`: the commands where a program's name cannot be given, as under torchrun and accelerate launch."""

from pixart.commands import main

if __name__ == "__main__":
    main()
