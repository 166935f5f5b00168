"""The command ``kasmina-rl``: train, evaluate and export controllers, and say whether there is anything to learn."""

from __future__ import annotations

import gc
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click
from kasmina_core import KasminaError

import kasmina_rl

FIRST_UNSEEN = 1_000_000
"""Number of the first episode of an evaluation; training draws from those below."""


FIXED_TUNING = 30
"""Episodes to play, at most, to choose among the five fixed times."""


def _options(texts: Sequence[str]) -> dict[str, Any]:
    found = {}
    for text in texts:
        name, is_given, value = text.partition("=")
        if not is_given:
            raise click.BadParameter(f"{text!r} is not NAME=VALUE")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _id(name: str) -> str:
    return name if ":" in name or "/" in name else f"Kasmina/{name.capitalize()}-v0"


env_option = click.option(
    "--env", "env_name", default="Toy", show_default=True, help="Toy, Digits, Chars, Grow, or an id."
)
option_option = click.option(
    "--option", "texts", multiple=True, help="Keyword of the environment, NAME=VALUE in JSON."
)


workers_option = click.option(
    "--workers",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Processes that share the episodes; the figures do not depend on it.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="kasmina-rl")
def cli() -> None:
    """Learn when to grow."""


@cli.command()
@env_option
@option_option
@click.option("--algo", type=click.Choice(["es", "ppo", "maskable-ppo"]), default="es", show_default=True)
@click.option(
    "--steps",
    type=click.IntRange(1),
    default=20_000,
    show_default=True,
    help="Steps in all, at most. es trains whole generations of 8 episodes, each of up to as many steps as the budget has "
    "epochs: 640 on Toy, and less is refused. maskable-ppo trains whole rollouts, of 32 steps at least.",
)
@click.option(
    "--episodes",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Different episodes to learn from.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder of the training, new or empty.",
)
@click.option("--resume", is_flag=True, help="Go on from the training in the folder, up to --steps in all.")
def train(
    env_name: str,
    texts: tuple[str, ...],
    algo: str,
    steps: int,
    episodes: int,
    seed: int,
    out: Path,
    resume: bool,
) -> None:
    """Train a controller."""
    from kasmina_rl.training import Settings, load_packages
    from kasmina_rl.training import train as run

    load_packages(algo)
    options = {"episodes": episodes} | _options(texts)
    settings = Settings(_id(env_name), options, algo, steps, seed, out, resume)
    try:
        with _small_heap():
            run(settings, click.echo)
    except KeyboardInterrupt:
        click.echo("Stopped. The same command with --resume goes on from what was saved.", err=True)
        sys.exit(130)
    click.echo(f"{out / 'controller.safetensors'}")


@cli.command()
@click.argument("model", type=click.Path(path_type=Path, dir_okay=False))
@click.argument("out", type=click.Path(path_type=Path))
def export(model: Path, out: Path) -> None:
    """Write the controller of MODEL, a zip file of stable-baselines3 in its training's folder, to OUT, a new file."""
    from kasmina_rl.training import export_model

    _demand_new(out)
    export_model(model).save(out)
    click.echo(str(out))


@cli.command()
@env_option
@option_option
@click.option("--episodes", type=click.IntRange(2), default=12, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write the figures as JSON to a new file, too.")
@workers_option
def headroom(env_name: str, texts: tuple[str, ...], episodes: int, out: Path | None, workers: int) -> None:
    """Compare fixed policies with waiting: is there anything to learn?"""
    from kasmina_rl import playing

    _demand_new(out)
    make = _maker(env_name, texts, workers)
    players = (
        {"wait": playing.waiting()} | _fixed() | {"plateau": playing.plateau(), "bandit": playing.bandit()}
    )
    with _small_heap():
        found = playing.play_all(make, players, _unseen(episodes), _progress, workers=workers)
    rows = _table(found)
    best, spreads = playing.headroom(found)
    verdict = "enough to learn" if spreads >= 3 else "too little to learn from: below 3"
    click.echo(f"best: {best}, {spreads:.1f} spreads above waiting; {verdict}")
    _write(out, {"rows": rows, "best": best, "spreads": spreads})


@cli.command()
@env_option
@option_option
@click.option(
    "--controller",
    "paths",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A trained controller; repeat it.",
)
@click.option("--episodes", type=click.IntRange(2), default=50, show_default=True, help="Unseen episodes.")
@click.option(
    "--tuning",
    type=click.IntRange(1),
    default=30,
    show_default=True,
    help="Episodes to play, at least, to tune the plateau policy. A controller is called better only if these are as many "
    "as it learned from.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Write the figures as JSON to a new file, too.")
@workers_option
def evaluate(
    env_name: str,
    texts: tuple[str, ...],
    paths: tuple[Path, ...],
    episodes: int,
    tuning: int,
    out: Path | None,
    workers: int,
) -> None:
    """Compare controllers with all other ways to decide, on the same unseen episodes."""
    from kasmina_rl import playing
    from kasmina_rl.learned import Controller
    from kasmina_rl.training import ControllerPlayer

    _demand_new(out)
    controllers = {f"controller {path}": ControllerPlayer(Controller.load(path)) for path in paths}
    make = _maker(env_name, texts, workers)
    env = make()
    _, info = env.reset(options={"episode": FIRST_UNSEEN})
    for player in controllers.values():
        player.act(env, info["action_mask"])  # one that does not fit is an error here, not after the tuning
    with _small_heap():
        tuned = _best(make, {f"{s}": playing.plateau(*s) for s in playing.TUNED}, tuning, workers)
        fixed = _best(make, _fixed(), min(tuning, FIXED_TUNING), workers)
    click.echo(f"tuned on {tuned[2]} episodes: plateau (patience, least improvement) {tuned[0]}")
    click.echo(f"chosen on {fixed[2]} episodes: {fixed[0]}")
    players = {
        "random": playing.RandomPlayer(0),
        "wait": playing.waiting(),
        "best fixed time": fixed[1],
        "plateau": playing.plateau(),
        "plateau, tuned": tuned[1],
        "bandit": playing.bandit(),
        **controllers,
    }
    with _small_heap():
        found = playing.play_all(make, players, _unseen(episodes), _progress, report=True, workers=workers)
    rows = _table(found)
    click.echo("\nless the tuned plateau policy, in pairs")
    click.echo(playing.HEAD)
    pairs = [
        playing.paired(found[name], found["plateau, tuned"], name)
        for name in players
        if name != "plateau, tuned"
    ]
    for row in pairs:
        click.echo(str(row))
    claims = {
        row.name: _claim(row, controllers[row.name].controller.record.get("episodes"), tuned[2])
        for row in pairs
        if row.name in controllers
    }
    for name, claim in claims.items():
        click.echo(f"{name}: {claim}")
    reports = {
        name: playing.Row.of(name, [p.report for p in played if p.report is not None])
        for name, played in found.items()
    }
    click.echo("\non the samples of reports, which no split of an episode holds")
    click.echo(playing.HEAD)
    for row in reports.values():
        click.echo(str(row))
    written = {
        "rows": rows,
        "pairs": [_plain(row) for row in pairs],
        "reports": [_plain(r) for r in reports.values()],
    }
    _write(out, written | {"tuned": [tuned[0], fixed[0]], "claims": claims})


@cli.command()
@env_option
@option_option
@click.option("--episodes", type=click.IntRange(1), default=4, show_default=True)
def speed(env_name: str, texts: tuple[str, ...], episodes: int) -> None:
    """Print steps per CPU second of random play, and what a step costs over a bare epoch of the host alone.

    Half of the actions wait. Each episode is played twice; the second time the host alone is known.
    """
    import time

    from kasmina_rl import playing

    env = _make(env_name, texts)
    for what in ("hosts alone trained with it", "hosts alone known"):
        began, steps = time.process_time(), 0
        with _small_heap():
            for episode in _unseen(episodes):
                steps += playing.play(env, playing.RandomPlayer(episode), episode).steps
        each = (time.process_time() - began) / steps
        bare = env.start(_unseen(1)[0])
        bare.train_epoch()
        began = time.process_time()
        for _ in range(20):
            bare.train_epoch()
        epoch = (time.process_time() - began) / 20
        click.echo(
            f"{what}: {1 / each:.0f} steps per CPU second, {each / epoch:.2f} of a bare epoch ({steps} steps)"
        )


@contextmanager
def _small_heap() -> Iterator[None]:
    """Leave out what is alive now when schedulers and averages of an episode's model are looked for.

    The search, at each germination and cull, is half of what a step costs. Nothing that is older than an episode belongs
    to its model; only the command may say so, as a program around the environment may hold other models.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _make(env_name: str, texts: Sequence[str]) -> Any:
    import gymnasium

    return gymnasium.make(_id(env_name), disable_env_checker=True, **_options(texts)).unwrapped


def _maker(env_name: str, texts: Sequence[str], workers: int) -> Callable[[], Any]:
    """Return what makes the environment; one that cannot be made is an error here, not in each process."""
    env = _make(env_name, texts)
    return partial(_make, env_name, texts) if workers > 1 else lambda: env


def _fixed() -> dict[str, Any]:
    from kasmina_rl import playing

    return {f"from {share:.0%} of the budget on": playing.fixed_times(share) for share in playing.SHARES}


def _unseen(episodes: int) -> list[int]:
    return list(range(FIRST_UNSEEN, FIRST_UNSEEN + episodes))


def _claim(pair: Any, learned_from: object, tuned_on: int) -> str:
    """Return what may be said of a controller, by its differences to a policy that was tuned on so many episodes."""
    if not isinstance(learned_from, int):
        return "no claim can be made: its record does not say how many episodes it learned from"
    if tuned_on < learned_from:
        return (
            f"no claim can be made: it learned from {learned_from} episodes, and the plateau policy was tuned on {tuned_on}; "
            f"give --tuning {learned_from}"
        )
    better = pair.mean - pair.half_width > 0
    return f"{'better' if better else 'not shown to be better'} than the tuned plateau policy"


def _best(
    make: Callable[[], Any], players: dict[str, Any], episodes: int, workers: int
) -> tuple[str, Any, int]:
    """Return the best of several players, and how many episodes they played in all: at least so many.

    All play the same ones, the first of training.
    """
    from kasmina_rl import playing

    each = math.ceil(episodes / len(players))
    found = playing.play_all(make, players, range(each), _progress, workers=workers)
    best = max(found, key=lambda name: sum(played.value for played in found[name]))
    return best, players[best], each * len(players)


def _table(found: Any) -> list[dict[str, Any]]:
    from kasmina_rl import playing

    rows = [playing.Row.of(n, [p.value for p in ps], [p.seeds_kept for p in ps]) for n, ps in found.items()]
    click.echo(playing.HEAD)
    for row in rows:
        click.echo(str(row))
    return [_plain(row) for row in rows]


def _plain(row: Any) -> dict[str, Any]:
    return {name: getattr(row, name) for name in row.__slots__}


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        click.echo(f"\r{text}   ", nl=False, err=True)


def _demand_new(out: Path | None) -> None:
    if out is not None and out.exists():
        from kasmina_rl.training import RequestError

        raise RequestError(f"'{out}' is there already: nothing was written. Give another name.")


def _write(out: Path | None, data: dict[str, Any]) -> None:
    if out is not None:
        out.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Run the command; a mistake is one line, and exit code 1, or 2 where the request is at fault."""
    assert kasmina_rl.__name__  # it registers the environments
    try:
        cli()
    except (KasminaError, ValueError) as error:
        from kasmina_rl.training import RequestError

        click.echo(f"Error: {error}", err=True)
        sys.exit(2 if isinstance(error, RequestError) else 1)
