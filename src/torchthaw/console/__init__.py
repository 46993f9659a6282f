"""What commands say on the terminal, with rich; everything goes to stderr, so that stdout stays for results."""

from torchthaw.console.reporter import Bar, Reporter, hide_loading_bars
from torchthaw.console.text import printable

__all__ = ["Bar", "Reporter", "hide_loading_bars", "printable"]
