"""From a folder of photos to shards, and from shards to crops, in an order that resumes exactly.

Import a module, not this package: packing needs no torch, reading needs no webdataset.
"""
