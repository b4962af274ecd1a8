"""The server over real HTTP: what is refused, what is harmless, and that no vote is lost."""

import json
import random
import sqlite3
import threading
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from ksr_distill.study.basket import Prompt
from tests.study.studies import Server, make_study_of

NASTY = '<script>document.title="stolen"</script><img src=x onerror=alert(1)>'


def votes_in(study: Path) -> list[tuple]:
    with sqlite3.connect(study / "study.sqlite") as connection:
        return connection.execute("SELECT id, pair, rater, choice FROM vote").fetchall()


def ballot(pair: int, choice: str = "left", **changes: object) -> dict:
    return {"id": uuid.uuid4().hex, "pair": pair, "choice": choice, "milliseconds": 900, **changes}


@pytest.fixture(scope="module")
def server(tmp_path_factory, serve) -> Server:
    prompts = [Prompt(f"p{index}", NASTY, "c") for index in range(60)]
    return serve(make_study_of(tmp_path_factory.mktemp("server"), prompts, question=NASTY))


@pytest.fixture
def ann(server) -> httpx.Client:
    return server.join(f"ann {uuid.uuid4().hex[:8]}")


def test_only_votes_that_the_page_could_have_sent_are_stored(server, ann):
    before = votes_in(server.study)
    pair = ann.get("/api/queue").json()["queue"][0]["pair"]
    refused = [
        (404, ballot(999)),
        (400, ballot("1")),
        (400, ballot(True)),
        (400, ballot(-1)),
        (400, ballot(2**70)),
        (400, ballot(pair, "banana")),
        (400, ballot(pair, None)),
        (400, ballot(pair, ["left"])),
        (400, ballot(pair, milliseconds=-5)),
        (400, ballot(pair, milliseconds=1e400)),
        (400, ballot(pair, milliseconds="NaN")),
        (400, ballot(pair, id="'; DROP TABLE vote; --")),
        (400, ballot(pair, id=7)),
        (400, [ballot(pair)]),
        (413, ballot(pair, note="x" * 5000)),
    ]
    for status, body in refused:
        answer = ann.post(
            "/api/vote", content=json.dumps(body), headers={"content-type": "application/json"}
        )
        assert answer.status_code == status, body
        assert answer.json()["error"]
    assert ann.post("/api/vote", content=b"{").status_code == 415
    bad_json = {"content-type": "application/json"}
    assert ann.post("/api/vote", content=b"\xff{", headers=bad_json).status_code == 400
    assert ann.post("/api/vote", content=b"[" * 4000, headers=bad_json).status_code == 400
    chunks = ann.post("/api/vote", content=iter([b"{}"]), headers=bad_json)
    assert chunks.status_code == 413
    assert votes_in(server.study) == before
    assert ann.post("/api/vote", json=ballot(pair)).status_code == 200
    assert len(votes_in(server.study)) == len(before) + 1


def test_a_forged_rater_is_refused_everywhere(server, ann):
    before, bob = votes_in(server.study), server.join("bob")
    item = bob.get("/api/queue").json()["queue"][0]
    rater, signature = bob.cookies["ksr_study"].split(".")
    other = ann.cookies["ksr_study"].split(".")[0]
    for forged in ("", rater, f"{rater}.", f"{other}.{signature}", f"{rater}.{'0' * 32}", "é.é"):
        cookie = {"cookie": f"ksr_study={forged}".encode()}
        with httpx.Client(base_url=server.url) as mallory:
            assert mallory.get("/api/queue", headers=cookie).status_code == 401
            vote = mallory.post("/api/vote", json=ballot(item["pair"]), headers=cookie)
            assert vote.status_code == 401
            undo = mallory.post("/api/undo", json={"id": uuid.uuid4().hex}, headers=cookie)
            assert undo.status_code == 401
            picture = mallory.get(f"/picture/{item['pair']}/left", headers=cookie)
            assert picture.status_code == 401
            assert mallory.get("/", headers=cookie).status_code == 401
    assert httpx.get(f"{server.url}/rater/{rater}.{'0' * 32}").status_code == 401
    assert httpx.get(f"{server.url}/join/{'0' * 32}").status_code == 403
    assert httpx.post(f"{server.url}/join/guess", data={"name": "eve"}).status_code == 403
    assert votes_in(server.study) == before


def test_html_in_a_prompt_and_a_question_stays_text(server, ann):
    page = ann.get("/")
    assert NASTY not in page.text
    assert "&lt;script&gt;" in page.text
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    queue = ann.get("/api/queue")
    assert queue.headers["content-type"] == "application/json"
    assert queue.headers["x-content-type-options"] == "nosniff"
    assert queue.json()["queue"][0]["prompt"] == NASTY  # the page shows it by textContent


@pytest.mark.parametrize("name", ["", " ", "<b>ann</b>", "=cmd()", "x" * 41, "a\x00b", 'a"b'])
def test_a_name_that_could_do_harm_is_not_stored(server, name):
    answer = httpx.post(server.url + server.invitation, data={"name": name})
    assert answer.status_code == 400
    assert "Use 1 to 40 letters" in answer.text
    with sqlite3.connect(server.study / "study.sqlite") as connection:
        stored = connection.execute("SELECT name FROM rater").fetchall()
    assert name.strip() not in {row[0] for row in stored}


def test_a_picture_is_shown_only_to_whom_its_pair_was_given(server, ann):
    given = [item["pair"] for item in ann.get("/api/queue").json()["queue"]]
    other = next(pair for pair in range(1, 61) if pair not in given)
    assert ann.get(f"/picture/{given[0]}/left").headers["content-type"] == "image/jpeg"
    assert ann.get(f"/picture/{other}/left").status_code == 404
    assert ann.get(f"/picture/{given[0]}/a").status_code == 404
    assert ann.get("/picture/..%2f..%2fsecret/left").status_code == 404
    assert ann.get("/static/..%2f..%2fserver.py").status_code == 404


def test_nothing_that_is_sent_tells_before_from_after(server, ann):
    state = ann.get("/api/queue")
    assert set(state.json()["queue"][0]) == {"pair", "prompt", "width", "height"}
    pair = state.json()["queue"][0]["pair"]
    headers = [dict(ann.get(f"/picture/{pair}/{side}").headers) for side in ("left", "right")]
    for header in headers:
        assert not {"etag", "last-modified", "content-disposition"} & set(header)
    assert "before" not in ann.get("/").text
    assert "after" not in ann.get("/static/study.js").text.replace("after the", "")


def test_the_personal_link_continues_on_another_device(server, ann):
    token = ann.cookies["ksr_study"]
    assert token in ann.get("/").text
    with httpx.Client(base_url=server.url, follow_redirects=True) as phone:
        assert phone.get(f"/rater/{token}").status_code == 200
        assert phone.get("/api/queue").json() == ann.get("/api/queue").json()


class Rater(threading.Thread):
    """A person with a bad connection: repeats votes until they are acknowledged, and then some."""

    def __init__(self, server: Server, name: str, seed: int) -> None:
        super().__init__()
        self.random = random.Random(seed)
        self.server, self.name = server, name
        self.client = server.join(name)
        self.acknowledged: dict[str, tuple[int, str]] = {}
        self.error: Exception | None = None

    def request(self, method: str, path: str, **options: object) -> httpx.Response:
        for _ in range(400):
            try:
                answer = self.client.request(method, path, **options)
            except httpx.TransportError:
                time.sleep(0.05)
                continue
            if answer.status_code < 500:
                return answer
        raise TimeoutError(f"{path} was never answered")

    def run(self) -> None:
        try:
            queue = self.request("GET", "/api/queue").json()["queue"]
            while queue:
                queue = self.judge(queue[0]["pair"])
        except Exception as error:  # noqa: BLE001 - shown by the test's own thread
            self.error = error

    def judge(self, pair: int) -> list[dict]:
        choice = self.random.choice(["left", "right", "both", "neither"])
        body = ballot(pair, choice)
        for _ in range(self.random.choice([1, 1, 2])):  # a repeated request must change nothing
            answer = self.request("POST", "/api/vote", json=body)
            assert answer.status_code == 200, answer.text
        self.acknowledged[body["id"]] = (pair, choice)
        if self.random.random() < 0.1:
            for _ in range(2):
                answer = self.request("POST", "/api/undo", json={"id": body["id"]})
                assert answer.status_code == 200, answer.text
            del self.acknowledged[body["id"]]
        return answer.json()["queue"]


def run_raters(server: Server, num_raters: int) -> list[Rater]:
    with ThreadPoolExecutor(10) as pool:
        return list(pool.map(lambda n: Rater(server, f"rater {n}", n), range(num_raters)))


def check_no_vote_is_lost_or_doubled(study: Path, raters: list[Rater]) -> None:
    assert [rater.error for rater in raters if rater.error] == []
    votes = votes_in(study)
    acknowledged = {key: vote for rater in raters for key, vote in rater.acknowledged.items()}
    assert {row[0]: (row[1], row[3]) for row in votes} == acknowledged
    assert len({(row[1], row[2]) for row in votes}) == len(votes)
    with sqlite3.connect(study / "study.sqlite") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_thirty_raters_at_once_and_a_killed_server_lose_and_double_no_vote(make_study, serve):
    study = make_study(45, votes_per_pair=2, num_checks=1)
    server = serve(study)
    raters = run_raters(server, 30)
    for rater in raters:
        rater.start()
    deadline = time.monotonic() + 60
    while len(votes_in(study)) < 25 and time.monotonic() < deadline:
        time.sleep(0.01)
    server.kill()
    assert len(votes_in(study)) < 90  # the kill came in the middle
    server.start()
    for rater in raters:
        rater.join()
    check_no_vote_is_lost_or_doubled(study, raters)
    real = Counter(row[1] for row in votes_in(study))
    with sqlite3.connect(study / "study.sqlite") as connection:
        pairs = [row[0] for row in connection.execute("SELECT id FROM pair WHERE kind = 'pair'")]
    assert {real[pair] for pair in pairs} == {2}  # leases: nobody's vote was one too many


@pytest.mark.slow
def test_thirty_raters_vote_on_the_announcements_basket_with_three_kills(make_study, serve):
    study = make_study(2100, 21, votes_per_pair=1, num_checks=10)
    server = serve(study)
    raters = run_raters(server, 30)
    for rater in raters:
        rater.start()
    for reached in (400, 900, 1500):
        while len(votes_in(study)) < reached:
            time.sleep(0.02)
        server.kill()
        server.start()
    for rater in raters:
        rater.join()
    check_no_vote_is_lost_or_doubled(study, raters)
    assert len(votes_in(study)) >= 2100
