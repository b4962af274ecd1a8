"""The side-by-side study: build it, serve it to raters, report their votes.

Only ``generate`` imports torch, so that the server starts in a second.
"""
