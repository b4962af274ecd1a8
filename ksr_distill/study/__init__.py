"""The side-by-side study: build it, serve it to people, report what they said.

Nothing here imports torch (``generate`` does, when it runs): the server starts in a second on any
machine.
"""
