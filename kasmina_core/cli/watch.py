"""``kasmina watch``: a page on this machine that follows runs."""

from __future__ import annotations

import json
import threading
import time
import webbrowser
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final
from urllib.parse import parse_qs, urlsplit

import click

from kasmina_core.cli.options import WrongRequestError
from kasmina_core.errors import KasminaError

if TYPE_CHECKING:
    from kasmina_core.experiments.following import FollowedRun
    from kasmina_core.experiments.record import RunRecord

_PAUSE: Final = 0.5
"""Seconds between two looks at the files."""

_ALIVE: Final = 15.0
"""Seconds after which a silent connection gets a sign of life, so that a closed page is noticed."""

_QUIET: Final = 120.0
"""Seconds without news after which the page says so: the run may have been killed."""

_TYPES: Final = {
    ".json": "application/json",
    ".csv": "text/csv",
    ".jsonl": "application/jsonl",
    ".png": "image/png",
}


@click.command(short_help="Follow runs on a page, while they go on.")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path))
@click.option(
    "--port", type=click.IntRange(0, 65535), default=0, help="Port on 127.0.0.1. Default: a free one."
)
@click.option("--open/--no-open", "opens", default=False, help="Open the page in a browser.")
def watch(runs: tuple[Path, ...], port: int, opens: bool) -> None:
    """Serve a page on 127.0.0.1 that follows each RUN: a folder that `kasmina grow` writes to, or the file of a
    JsonLinesSink of your own loop. Several runs are compared.

    It reads files and nothing else: a run does not notice it. Ctrl-C ends it.

    \b
    Exit code:
      0    ended with Ctrl-C
      1    the port is taken
      2    there is no such run
    """
    from kasmina_core.experiments.following import FollowedRun, FollowError

    try:
        board = Board([FollowedRun(run) for run in runs])
        board.look()
    except FollowError as error:
        raise WrongRequestError(str(error)) from error
    try:
        server = make_server(board, port)
    except OSError as error:
        raise click.ClickException(f"127.0.0.1:{port} cannot be used: {error.strerror}.") from error
    address = f"http://127.0.0.1:{server.server_port}/"
    click.echo(f"{address}  (Ctrl-C ends it)")
    threading.Thread(target=board.keep_looking, daemon=True).start()
    if opens:
        webbrowser.open(address)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        click.echo("Ended.", err=True)
    finally:
        server.server_close()


@final
class Board:
    """The runs that a page shows, and a number that goes up when one of them has something new."""

    def __init__(self, runs: list[FollowedRun]) -> None:
        self.runs = runs
        self.version = 0
        self._quiet: list[float | None] = []
        self._lock = threading.Condition()

    def look(self) -> None:
        """Read what is new in each run."""
        with self._lock:
            news = [run.update() for run in self.runs]  # all of them
            before, self._quiet = self._quiet, [_quiet_since(run) for run in self.runs]
            if any(news) or before != self._quiet:
                self.version += 1
                self._lock.notify_all()

    def keep_looking(self) -> None:
        """Look again and again."""
        while True:
            time.sleep(_PAUSE)
            with suppress(KasminaError):  # a run that begins with lines of others
                self.look()

    def wait(self, version: int) -> int:
        """Return the number once it is another than ``version``, or after a while all the same."""
        with self._lock:
            self._lock.wait_for(lambda: self.version != version, timeout=_ALIVE)
            return self.version

    def page(self, number: int | None) -> str:
        """Return the page of a run, or of all."""
        from kasmina_core.experiments.page import as_text, whole_page

        several = len(self.runs) > 1
        chosen = number if several else 0
        shown = self.data(chosen)
        back = '<p><a href="/">all runs</a></p>' if several and number is not None else ""
        body = f'{back}<p id="state">{as_text(shown["state"])}</p><div id="run">{shown["html"]}</div>'
        follow = "/data" if chosen is None else f"/data?run={chosen}"
        return whole_page(shown["title"], body, shown["charts"], follow)

    def data(self, number: int | None) -> dict[str, Any]:
        """Return what the page of a run, or of all, shows now."""
        from kasmina_core.experiments.page import as_text, charts_of, html_table, several_charts
        from kasmina_core.experiments.report import DOWNLOADS, body_of, title_of
        from kasmina_core.experiments.wording import TextTable, count, loss

        shown = self.runs if number is None else [self.runs[number]]
        with self._lock:
            records = [run.record() for run in shown]
            done = [run.is_done for run in shown]
            quiet = [_quiet_since(run) for run in shown]
        if number is not None:
            run, record = shown[0], records[0]
            there = [name for name in DOWNLOADS if run.path.is_dir() and (run.path / name).exists()]
            links = " · ".join(f'<a href="/file?run={number}&amp;name={name}">{name}</a>' for name in there)
            last = record.epochs[-1].epoch if record.epochs else 0
            state = "The run has ended." if done[0] else f"After epoch {last}; {_news(quiet[0])}."
            if quiet[0] is not None and run.path.is_dir() and not done[0]:
                state += f" If it was stopped or killed: kasmina grow --resume {run.path}"
            files = f"<h2>Files</h2><p>{links}</p>" if links else ""
            return {
                "title": title_of(record),
                "html": body_of(record) + files,
                "charts": charts_of(record),
                "state": state,
            }
        names = [f"{i + 1}: {run.name}" for i, run in enumerate(self.runs)]
        known = list(dict.fromkeys(key for record in records for key in record.config))
        differing = [key for key in known if len({_setting(record, key) for record in records}) > 1]
        rows = tuple(
            (
                name,
                "ended" if ended else _news(since),
                *(_setting(record, key) for key in differing),
                _epochs(record),
                loss(record.epochs[-1].val_loss) if record.epochs else "",
                count(record.epochs[-1].parameters) if record.epochs else "",
                f"{sum(seed.outcome == 'fossilized' for seed in record.seeds)} of {len(record.seeds)}",
            )
            for name, record, ended, since in zip(names, records, done, quiet, strict=True)
        )
        head = ("run", "state", *differing, "epochs", "last loss or metric", "parameters", "seeds kept")
        table = html_table(TextTable("Runs", head, rows, frozenset(range(len(differing) + 2, len(head)))))
        links = "".join(f'<li><a href="/?run={i}">{as_text(name)}</a></li>' for i, name in enumerate(names))
        return {
            "title": f"{len(names)} runs",
            "html": f'<div id="charts"></div>{table}<ul>{links}</ul>',
            "charts": several_charts(list(zip(names, records, strict=True))),
            "state": f"{sum(done)} of {len(done)} have ended; the page follows.",
        }


def _quiet_since(run: FollowedRun) -> float | None:
    """Return when the last news of a run came, if that is long ago and it has not ended."""
    last = run.last_news
    return last if not run.is_done and 0.0 < last < time.time() - _QUIET else None


def _news(quiet_since: float | None) -> str:
    if quiet_since is None:
        return "the page follows"
    return f"no news since {time.strftime('%H:%M', time.localtime(quiet_since))}"


def _setting(record: RunRecord, key: str) -> str:
    value = record.host if key == "host" and record.host else record.config.get(key, "")
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _epochs(record: RunRecord) -> str:
    planned = record.config.get("epochs")
    return f"{len(record.epochs):,}" + (f" of {planned:,}" if isinstance(planned, int) else "")


def make_server(board: Board, port: int) -> ThreadingHTTPServer:
    """Return a server of the board's pages on 127.0.0.1.

    Raises:
        OSError: If the port cannot be used.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"

        def do_GET(self) -> None:
            # Another site's name that was made to point at this machine must not read a run.
            host = (self.headers.get("Host") or "").rpartition(":")[0]
            if host not in ("127.0.0.1", "localhost"):
                self.send_error(HTTPStatus.FORBIDDEN)
                return
            asked = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(asked.query).items()}
            number = None
            if "run" in query:
                text = query["run"]
                if not (text.isdecimal() and len(text) < 6 and int(text) < len(board.runs)):
                    self.send_error(HTTPStatus.NOT_FOUND)
                    return
                number = int(text)
            if asked.path == "/":
                self._answer(board.page(number).encode(), "text/html; charset=utf-8")
            elif asked.path == "/data":
                self._answer(json.dumps(board.data(number), allow_nan=False).encode(), "application/json")
            elif asked.path == "/changes":
                self._changes()
            elif asked.path == "/file" and number is not None:
                self._file(number, query.get("name", ""))
            else:
                self.send_error(HTTPStatus.NOT_FOUND)

        def _answer(self, content: bytes, kind: str, name: str = "") -> None:
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            if name:
                self.send_header("Content-Disposition", f'attachment; filename="{name}"')
            self.end_headers()
            self.wfile.write(content)

        def _changes(self) -> None:
            seen = board.version  # before the page can know that it is connected
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            try:
                while True:
                    version = board.wait(seen)
                    self.wfile.write(b"data: new\n\n" if version != seen else b": still here\n\n")
                    self.wfile.flush()
                    seen = version
            except OSError:
                return  # the page was closed

        def _file(self, number: int, name: str) -> None:
            from kasmina_core.experiments.report import DOWNLOADS

            folder = board.runs[number].path
            try:
                content = (folder / name).read_bytes() if name in DOWNLOADS and folder.is_dir() else None
            except OSError:
                content = None
            if content is None:
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            self._answer(content, _TYPES[Path(name).suffix], name)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing of requests."""

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    return server
