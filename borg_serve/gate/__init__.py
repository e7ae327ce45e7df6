"""The ASGI application in front of vLLM's: who may ask, how much, how long."""
