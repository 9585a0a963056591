"""What the command line offers beside training, one module per command."""
