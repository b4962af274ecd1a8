"""webdataset, told to run no shell and to unpickle nothing. Import it from here only.

It reads WDS_SECURE when it is first imported; without it a ``pipe:`` URL runs a shell, and
``.pyd``, ``.pkl`` and ``.pth`` members run code (measured on 1.0.2). Under it, webdataset opens no
local files either: open them yourself, and pass the stream.
"""

import os
from typing import Any

os.environ["WDS_SECURE"] = "1"

import webdataset as _webdataset

webdataset: Any = _webdataset  # it makes its names at run time, type checkers do not find them
webdataset.utils.enforce_security = True  # if somebody else imported it first

__all__ = ["webdataset"]
