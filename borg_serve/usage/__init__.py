"""The usage ledger: what each API key has used, written on this machine first and then added up in a database.

It knows neither HTTP nor the engine.
"""
