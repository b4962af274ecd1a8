"""The study's database: raters, the pairs and sides assigned to them, and their votes.

One SQLite file in WAL mode, flushed to disk at every commit, so that neither a killed server nor a
power cut loses an acknowledged vote. Sides are stored as the rater saw them; the report maps them
to A and B.
"""

import secrets
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Literal, NamedTuple

from ksr_distill.study.schema import DATABASE_NAME, FORMAT, Pair

Side = Literal["left", "right"]

# Pairs that still need votes, where other raters' unexpired leases count as votes; fewest first,
# then in an order of the rater's own: squares of the salt's multiples modulo a prime. The multiples
# alone give a few dozen orders, so that two raters sometimes shared one.
OPEN_PAIRS = """
SELECT id FROM (
    SELECT pair.id AS id,
        (SELECT COUNT(*) FROM vote WHERE vote.pair = pair.id)
        + (SELECT COUNT(*) FROM assignment AS lease
           LEFT JOIN vote ON vote.rater = lease.rater AND vote.pair = lease.pair
           WHERE lease.pair = pair.id AND lease.rater <> :rater
               AND lease.expires > :now AND vote.id IS NULL) AS taken
    FROM pair
    WHERE pair.kind = 'pair' AND {mine}
)
WHERE taken < :wanted ORDER BY taken,
    (id * :salt % 2147483647) * (id * :salt % 2147483647) % 2147483647 LIMIT 1
"""
NEW_PAIR = OPEN_PAIRS.format(
    mine="pair.id NOT IN (SELECT pair FROM assignment WHERE rater = :rater)"
)
STILL_OPEN = OPEN_PAIRS.format(mine="pair.id = :pair")


class Assigned(NamedTuple):
    """A pair as one rater sees it."""

    pair: Pair
    left: str


class RefusedError(ValueError):
    """A request that is refused; nothing was stored.

    Attributes:
        status: The HTTP status of the response.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Store:
    """All reads and writes of a study, from any thread.

    Args:
        folder: What ``ksr study build`` made.
        clock: Seconds since 1970; leases are measured with it.
    """

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.time) -> None:
        path = folder / DATABASE_NAME
        if not path.is_file():
            raise ValueError(f"{folder}: no {DATABASE_NAME} in it; make a study by ksr study build")
        self.folder = folder
        self.clock = clock
        self._lock = Lock()
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
                self._connection.execute(f"PRAGMA {pragma}")
            self._connection.execute("PRAGMA busy_timeout=10000")
            self.settings = dict(self._connection.execute("SELECT key, value FROM setting"))
        except sqlite3.DatabaseError as error:
            self._connection.close()
            raise ValueError(f"{path}: not a study's database ({error}); build it again") from error
        if self.settings.get("format") != str(FORMAT):
            self.close()
            raise ValueError(
                f"{path}: format {self.settings.get('format')}, this version reads {FORMAT}; "
                "use the version that built it"
            )

    def close(self) -> None:
        """Close the database; the store cannot be used afterwards."""
        self._connection.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def rows(self, query: str, *values: object) -> list[tuple]:
        """Return all rows of a SELECT query."""
        with self._lock:
            return self._connection.execute(query, values).fetchall()

    def add_rater(self, name: str) -> str:
        """Return the id of a new rater.

        Raises:
            RefusedError: The name is taken.
        """
        # The system's entropy, not the project's generators: an id must not be guessable.
        rater, salt = secrets.token_hex(8), secrets.randbelow(2**31 - 3) + 1
        try:
            with self._transaction() as connection:
                row = (rater, name, salt, self.clock())
                connection.execute("INSERT INTO rater VALUES (?,?,?,?)", row)
        except sqlite3.IntegrityError as error:
            raise RefusedError(
                409,
                f"the name {name!r} is taken; if it is yours, open your personal link, "
                "otherwise take another name",
            ) from error
        return rater

    def has_rater(self, rater: str) -> bool:
        """Return whether the rater joined this study."""
        return bool(self.rows("SELECT 1 FROM rater WHERE id = ?", rater))

    def queue(self, rater: str, ahead: int) -> list[Assigned]:
        """Return the rater's next pairs, at most ``ahead``, and renew their leases.

        Unanswered pairs come first, with the same sides after every reload.
        """
        with self._transaction() as connection:
            ahead = min(ahead, self._room(connection, rater))
            issued = self._resumable(connection, rater)[:ahead]
            while len(issued) < ahead:
                pair = self._issue(connection, rater)
                if pair is None:
                    break
                issued.append(pair)
            expires = self.clock() + float(self.settings["lease_seconds"])
            connection.executemany(
                "UPDATE assignment SET expires = ? WHERE rater = ? AND pair = ?",
                [(expires, rater, pair) for pair in issued],
            )
            return [self._assigned(connection, rater, pair) for pair in issued]

    def _room(self, connection: sqlite3.Connection, rater: str) -> int:
        query = "SELECT COUNT(*) FROM vote WHERE rater = ?"
        (done,) = connection.execute(query, (rater,)).fetchone()
        limit = int(self.settings["votes_per_rater"]) or sys.maxsize
        return max(0, limit - done)

    def _resumable(self, connection: sqlite3.Connection, rater: str) -> list[int]:
        rows = connection.execute(
            "SELECT assignment.pair, assignment.expires, pair.kind FROM assignment "
            "JOIN pair ON pair.id = assignment.pair "
            "LEFT JOIN vote ON vote.rater = assignment.rater AND vote.pair = assignment.pair "
            "WHERE assignment.rater = ? AND vote.id IS NULL ORDER BY assignment.position",
            (rater,),
        ).fetchall()
        now = self.clock()
        return [
            pair
            for pair, expires, kind in rows
            if kind != "pair" or expires > now or self._find(connection, STILL_OPEN, rater, pair)
        ]

    def _find(
        self, connection: sqlite3.Connection, query: str, rater: str, pair: int = 0
    ) -> int | None:
        (salt,) = connection.execute("SELECT salt FROM rater WHERE id = ?", (rater,)).fetchone()
        values = {
            "rater": rater,
            "now": self.clock(),
            "wanted": int(self.settings["votes_per_pair"]),
            "salt": salt,
            "pair": pair,
        }
        row = connection.execute(query, values).fetchone()
        return row[0] if row else None

    def _issue(self, connection: sqlite3.Connection, rater: str) -> int | None:
        (given,) = connection.execute(
            "SELECT COUNT(*) FROM assignment WHERE rater = ?", (rater,)
        ).fetchone()
        pair = self._check_due(connection, rater, given)
        if pair is None:
            pair = self._find(connection, NEW_PAIR, rater)
        if pair is not None:
            row = (pair, rater, self._side(connection, rater, pair), given, self.clock())
            connection.execute("INSERT INTO assignment VALUES (?,?,?,?,?)", row)
        return pair

    def _check_due(self, connection: sqlite3.Connection, rater: str, given: int) -> int | None:
        """Return an attention check if one is due: once per stretch, at a pseudo-random place."""
        stretch = int(self.settings["check_every"]) + 1
        (salt,) = connection.execute("SELECT salt FROM rater WHERE id = ?", (rater,)).fetchone()
        # Knuth's multiplicative hash: the golden ratio's 32 bits (TAOCP vol. 3, §6.4).
        place = (salt * (given // stretch + 1) * 2654435761 >> 7) % stretch
        if given % stretch != place:
            return None
        row = connection.execute(
            "SELECT id FROM pair WHERE kind <> 'pair' AND id NOT IN "
            "(SELECT pair FROM assignment WHERE rater = ?1) ORDER BY "
            "(id * ?2 % 2147483647) * (id * ?2 % 2147483647) % 2147483647 LIMIT 1",
            (rater, salt),
        ).fetchone()
        return row[0] if row else None

    def _side(self, connection: sqlite3.Connection, rater: str, pair: int) -> str:
        """Return which picture goes left: at random, the rater's imbalance being at most two.

        Soares and Wu's big stick design (1983); within that limit, the sides of the pair are
        balanced over raters.
        """
        tilt = "SELECT COALESCE(SUM(CASE left WHEN 'a' THEN 1 ELSE -1 END), 0) FROM assignment "
        (of_rater,) = connection.execute(tilt + "WHERE rater = ?", (rater,)).fetchone()
        if abs(of_rater) >= 2:
            return "b" if of_rater > 0 else "a"
        (of_pair,) = connection.execute(tilt + "WHERE pair = ?", (pair,)).fetchone()
        if of_pair:
            return "b" if of_pair > 0 else "a"
        return secrets.choice("ab")

    def _assigned(self, connection: sqlite3.Connection, rater: str, pair: int) -> Assigned:
        row = connection.execute(
            "SELECT pair.*, assignment.left FROM assignment JOIN pair ON pair.id = assignment.pair "
            "WHERE assignment.rater = ? AND assignment.pair = ?",
            (rater, pair),
        ).fetchone()
        if row is None:
            raise RefusedError(404, f"pair {pair} was not given to this rater; load the page again")
        return Assigned(Pair(*row[:-1]), row[-1])

    def vote(self, rater: str, vote_id: str, pair: int, choice: str, milliseconds: int) -> str:
        """Store the vote and return "stored", or "undone" if it was undone before.

        A repeated request changes nothing. A vote whose lease has expired is kept: it is a
        person's judgement all the same.

        Raises:
            RefusedError: The pair was not given to the rater, or has another vote of theirs.
        """
        with self._transaction() as connection:
            same = (vote_id, pair, rater, choice)
            for table, answer in (("vote", "stored"), ("undone", "undone")):
                row = connection.execute(
                    f"SELECT id, pair, rater, choice FROM {table} WHERE id = ?", (vote_id,)
                ).fetchone()
                if row == same:
                    return answer
                if row:
                    raise RefusedError(409, f"vote id {vote_id} was used before; use a new one")
            self._assigned(connection, rater, pair)
            try:
                row = (vote_id, pair, rater, choice, milliseconds, self.clock())
                connection.execute("INSERT INTO vote VALUES (?,?,?,?,?,?)", row)
            except sqlite3.IntegrityError as error:
                raise RefusedError(
                    409, f"pair {pair} has a vote of this rater already; undo it first"
                ) from error
        return "stored"

    def undo(self, rater: str, vote_id: str) -> None:
        """Undo the vote and put its pair at the front of the rater's queue.

        Raises:
            RefusedError: The rater has no such vote.
        """
        with self._transaction() as connection:
            key = (vote_id, rater)
            if connection.execute(
                "SELECT 1 FROM undone WHERE id = ? AND rater = ?", key
            ).fetchone():
                return
            row = connection.execute(
                "SELECT * FROM vote WHERE id = ? AND rater = ?", key
            ).fetchone()
            if row is None:
                raise RefusedError(404, f"no vote {vote_id} of this rater; load the page again")
            connection.execute("DELETE FROM vote WHERE id = ?", (vote_id,))
            connection.execute("INSERT INTO undone VALUES (?,?,?,?,?,?,?)", (*row, self.clock()))
            connection.execute(
                "UPDATE assignment SET expires = ?, position = "
                "(SELECT MIN(position) - 1 FROM assignment WHERE rater = ?) "
                "WHERE rater = ? AND pair = ?",
                (self.clock() + float(self.settings["lease_seconds"]), rater, rater, row[1]),
            )

    def last_vote(self, rater: str) -> tuple[str, Assigned] | None:
        """Return the rater's latest vote's id and its pair, for undo after a reload."""
        with self._transaction() as connection:
            row = connection.execute(
                "SELECT id, pair FROM vote WHERE rater = ? ORDER BY at DESC LIMIT 1", (rater,)
            ).fetchone()
            return (row[0], self._assigned(connection, rater, row[1])) if row else None

    def progress(self, rater: str) -> dict[str, int]:
        """Return the numbers of votes given and wanted, by this rater and in the whole study."""
        ((mine, given, wanted),) = self.rows(
            "SELECT (SELECT COUNT(*) FROM vote WHERE rater = ?), (SELECT COUNT(*) FROM vote JOIN "
            "pair ON pair.id = vote.pair WHERE kind = 'pair'), "
            "(SELECT COUNT(*) FROM pair WHERE kind = 'pair')",
            rater,
        )
        return {
            "mine": mine,
            "limit": int(self.settings["votes_per_rater"]),
            "given": given,
            "wanted": wanted * int(self.settings["votes_per_pair"]),
        }

    def picture(self, rater: str, pair: int, side: Side) -> Path:
        """Return the file that the rater sees on that side.

        Raises:
            RefusedError: The pair was not given to the rater.
        """
        with self._transaction() as connection:
            assigned = self._assigned(connection, rater, pair)
        shows_a = (assigned.left == "a") == (side == "left")
        name = assigned.pair.picture_a if shows_a else assigned.pair.picture_b
        return self.folder / "pictures" / name
