"""Studies: many training runs of several arms, learning rates and seeds at the same cost, and the page that compares them."""
