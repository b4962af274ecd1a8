"""The tables of a study's database, and its creation."""

import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

DATABASE_NAME = "study.sqlite"
FORMAT = 1
CHOICES = ("left", "right", "both", "neither")

SCHEMA = """
CREATE TABLE setting (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE pair (
    id INTEGER PRIMARY KEY,
    kind TEXT NOT NULL CHECK (kind IN ('pair', 'identical', 'blurred')),
    prompt_id TEXT NOT NULL, prompt TEXT NOT NULL, category TEXT NOT NULL,
    width INTEGER NOT NULL, height INTEGER NOT NULL,
    picture_a TEXT NOT NULL, picture_b TEXT NOT NULL
);
CREATE TABLE rater (
    id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE COLLATE NOCASE,
    salt INTEGER NOT NULL, joined REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE assignment (
    pair INTEGER NOT NULL REFERENCES pair, rater TEXT NOT NULL REFERENCES rater,
    left TEXT NOT NULL CHECK (left IN ('a', 'b')),
    position INTEGER NOT NULL, expires REAL NOT NULL,
    PRIMARY KEY (rater, pair)
) WITHOUT ROWID;
CREATE TABLE vote (
    id TEXT PRIMARY KEY, pair INTEGER NOT NULL, rater TEXT NOT NULL,
    choice TEXT NOT NULL CHECK (choice IN ('left', 'right', 'both', 'neither')),
    milliseconds INTEGER NOT NULL CHECK (milliseconds >= 0), at REAL NOT NULL,
    UNIQUE (rater, pair), FOREIGN KEY (rater, pair) REFERENCES assignment
) WITHOUT ROWID;
CREATE TABLE undone (
    id TEXT PRIMARY KEY, pair INTEGER NOT NULL, rater TEXT NOT NULL, choice TEXT NOT NULL,
    milliseconds INTEGER NOT NULL, at REAL NOT NULL, undone_at REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX vote_pair ON vote (pair);
CREATE INDEX assignment_pair ON assignment (pair);
"""


class Pair(NamedTuple):
    """A row of the pair table: two pictures of one prompt, or an attention check."""

    id: int
    kind: str
    prompt_id: str
    prompt: str
    category: str
    width: int
    height: int
    picture_a: str
    picture_b: str


def create_database(path: Path, pairs: Iterable[Pair], settings: dict[str, str]) -> None:
    """Write a new study with these pairs and no votes."""
    with sqlite3.connect(path) as connection:
        connection.executescript(SCHEMA)
        connection.executemany("INSERT INTO pair VALUES (?,?,?,?,?,?,?,?,?)", pairs)
        settings = {**settings, "format": str(FORMAT)}
        connection.executemany("INSERT INTO setting VALUES (?,?)", settings.items())
    connection.close()
