"""The artifact in other engines; each file imports its own engine only, and of this package little but `artifact`.

Only `llama_capture.py` looks further: a prefix that llama.cpp tokenizes ends where `capturing.prefix` says one ends.
"""
