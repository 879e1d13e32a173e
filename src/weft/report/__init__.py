"""Tables, plots, contact sheets and self-contained HTML pages: used by every room, uses none of them."""
