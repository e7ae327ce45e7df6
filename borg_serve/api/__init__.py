"""What clients may say and what they get back, one file a protocol."""
