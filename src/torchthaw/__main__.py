"""`python -m torchthaw`."""

from torchthaw.cli import main

if __name__ == "__main__":
    main()
