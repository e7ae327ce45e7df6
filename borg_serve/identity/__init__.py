"""The identity: its text, its tokens, and the template that puts it first."""
