"""The chat page: a Gradio page and the API client behind it. It knows no model and no engine."""
