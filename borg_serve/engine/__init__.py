"""vLLM's engine: its arguments, its memory, its client, its guard."""
