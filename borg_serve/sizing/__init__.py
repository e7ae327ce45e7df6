"""How many GPUs some users need."""
