"""Tasks and the data module that serves them."""
