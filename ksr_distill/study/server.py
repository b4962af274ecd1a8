"""The study's web server: raters stay blind, and everything a browser sends is validated."""

import json
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from jinja2 import Environment, PackageLoader
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from ksr_distill.study.schema import CHOICES
from ksr_distill.study.store import Assigned, RefusedError, Store
from ksr_distill.study.tokens import is_invitation, rater_of_token, rater_token, read_secret

COOKIE = "ksr_study"
AHEAD = 3  # the pair on screen and two that are preloaded
MAX_BODY_BYTES = 4096
MAX_MILLISECONDS = 24 * 3600 * 1000
VOTE_ID = re.compile(r"[0-9a-f-]{32,40}")
NAME = re.compile(r"\w[\w .-]{0,39}")
MEDIA_TYPES = {".jpg": "image/jpeg", ".png": "image/png"}

# No inline script or style and no other origins: HTML in a prompt would not run even if a template
# did not escape it.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class SafeHeaders(BaseHTTPMiddleware):
    """Adds the security headers to every response."""

    async def dispatch(
        self, request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        """Return the response with those headers that it does not set itself."""
        response = await call_next(request)
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        return response


def make_app(folder: Path) -> Starlette:
    """Return the ASGI application of a built study.

    Raises:
        ValueError: The folder is no study.
    """
    study = StudyPages(Store(folder), read_secret(folder))
    static = StaticFiles(directory=Path(__file__).parent / "static")
    routes = [
        Route("/", study.page),
        Route("/join/{code}", study.join_form, methods=["GET"]),
        Route("/join/{code}", study.join, methods=["POST"]),
        Route("/rater/{token}", study.personal_link),
        Route("/api/queue", study.queue),
        Route("/api/vote", study.vote, methods=["POST"]),
        Route("/api/undo", study.undo, methods=["POST"]),
        Route("/picture/{pair:int}/{side}", study.picture),
        Mount("/static", static),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(SafeHeaders)],
        exception_handlers={RefusedError: _refusal},
    )


def _refusal(_request: Request, error: Exception) -> Response:
    status = error.status if isinstance(error, RefusedError) else 500
    return JSONResponse({"error": str(error)}, status_code=status)


class StudyPages:
    """The handlers, around one store."""

    def __init__(self, store: Store, secret: bytes) -> None:
        self.store = store
        self.secret = secret
        self.templates = Environment(loader=PackageLoader("ksr_distill.study"), autoescape=True)

    def _render(self, name: str, status: int = 200, **values: object) -> Response:
        html = self.templates.get_template(name).render(settings=self.store.settings, **values)
        return HTMLResponse(html, status_code=status)

    def _rater(self, request: Request) -> str:
        rater = rater_of_token(self.secret, request.cookies.get(COOKIE, ""))
        if rater is None or not self.store.has_rater(rater):
            raise RefusedError(401, "open the invitation or your personal link first")
        return rater

    def _signed_in(self, request: Request, rater: str) -> Response:
        response = RedirectResponse("/", status_code=303)
        response.set_cookie(
            COOKIE,
            rater_token(self.secret, rater),
            max_age=90 * 24 * 3600,
            httponly=True,
            samesite="lax",
            secure=request.url.scheme == "https",
        )
        return response

    def page(self, request: Request) -> Response:
        """Return the voting page, or one that asks for an invitation."""
        try:
            rater = self._rater(request)
        except RefusedError as refused:
            return self._render("closed.html", refused.status)
        link = str(request.url_for("personal_link", token=rater_token(self.secret, rater)))
        return self._render("study.html", rater=rater, link=link)

    def _check_invitation(self, request: Request) -> None:
        if not is_invitation(self.secret, request.path_params["code"]):
            raise RefusedError(
                403, "this invitation is not one of this study; ask for the right link"
            )

    def join_form(self, request: Request) -> Response:
        """Return the page that asks for a name."""
        self._check_invitation(request)
        return self._render("join.html", message="")

    async def join(self, request: Request) -> Response:
        """Register a rater by name and redirect to the study."""
        self._check_invitation(request)
        form = parse_qs((await _read_body(request)).decode(errors="replace"))
        name = " ".join(form.get("name", [""])[0].split())
        if not NAME.fullmatch(name):
            message = "Use 1 to 40 letters, digits, spaces, dots or dashes for the name."
            return self._render("join.html", 400, message=message)
        try:
            rater = await run_in_threadpool(self.store.add_rater, name)
        except RefusedError as refused:
            return self._render("join.html", refused.status, message=str(refused))
        return self._signed_in(request, rater)

    def personal_link(self, request: Request) -> Response:
        """Sign the rater in on another device."""
        rater = rater_of_token(self.secret, request.path_params["token"])
        if rater is None or not self.store.has_rater(rater):
            raise RefusedError(401, "this link is not one of this study; ask for the right one")
        return self._signed_in(request, rater)

    def queue(self, request: Request) -> Response:
        """Return the pairs to judge next."""
        return self._state(self._rater(request))

    async def vote(self, request: Request) -> Response:
        """Store one vote; a repeated request changes nothing."""
        rater = await run_in_threadpool(self._rater, request)
        body = await _read_json(request)
        vote_id, pair, choice = _vote_id(body), body.get("pair"), body.get("choice")
        milliseconds = body.get("milliseconds")
        if type(pair) is not int or not 0 < pair < 2**31:
            raise RefusedError(400, f"pair={str(pair)[:40]!r} is no pair's number")
        if choice not in CHOICES:
            raise RefusedError(400, f"choice={str(choice)[:40]!r}; allowed: {', '.join(CHOICES)}")
        if type(milliseconds) is not int or not 0 <= milliseconds <= MAX_MILLISECONDS:
            raise RefusedError(400, f"milliseconds must be a whole number up to {MAX_MILLISECONDS}")
        await run_in_threadpool(self.store.vote, rater, vote_id, pair, choice, milliseconds)
        return await run_in_threadpool(self._state, rater)

    async def undo(self, request: Request) -> Response:
        """Undo one vote."""
        rater = await run_in_threadpool(self._rater, request)
        vote_id = _vote_id(await _read_json(request))
        await run_in_threadpool(self.store.undo, rater, vote_id)
        return await run_in_threadpool(self._state, rater)

    def picture(self, request: Request) -> Response:
        """Return a picture; its address does not reveal which folder it is from."""
        side = request.path_params["side"]
        if side not in ("left", "right"):
            raise RefusedError(404, "sides are left and right")
        path = self.store.picture(self._rater(request), request.path_params["pair"], side)
        # The bytes alone: a file's date or ETag could reveal the folder.
        return Response(
            path.read_bytes(),
            media_type=MEDIA_TYPES[path.suffix],
            headers={"Cache-Control": "private, max-age=86400, immutable"},
        )

    def _state(self, rater: str) -> Response:
        last = self.store.last_vote(rater)
        return JSONResponse(
            {
                "queue": [self._item(assigned) for assigned in self.store.queue(rater, AHEAD)],
                "last": {"id": last[0], "item": self._item(last[1])} if last else None,
                "progress": self.store.progress(rater),
            }
        )

    def _item(self, assigned: Assigned) -> dict[str, Any]:
        pair = assigned.pair
        shown = self.store.settings["prompts_shown"] == "yes"
        return {
            "pair": pair.id,
            "prompt": pair.prompt if shown else "",
            "width": pair.width,
            "height": pair.height,
        }


async def _read_body(request: Request) -> bytes:
    """Return the body, refusing a long one before it is read."""
    length = request.headers.get("content-length", "")
    if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
        raise RefusedError(413, f"a request body needs a length of at most {MAX_BODY_BYTES} bytes")
    return await request.body()


async def _read_json(request: Request) -> dict[str, Any]:
    # Another site's page would need a CORS preflight to send this type, and none is allowed.
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        raise RefusedError(415, "send application/json")
    try:
        body = json.loads(await _read_body(request))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise RefusedError(400, "the body is no JSON") from error
    if not isinstance(body, dict):
        raise RefusedError(400, "the body is no JSON object")
    return body


def _vote_id(body: dict[str, Any]) -> str:
    vote_id = body.get("id")
    if not isinstance(vote_id, str) or not VOTE_ID.fullmatch(vote_id):
        raise RefusedError(400, "id must be a UUID that the page made")
    return vote_id
