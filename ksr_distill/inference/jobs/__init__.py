"""From picture files to enlarged files: what is to be done, its cost, and going on after a kill."""
