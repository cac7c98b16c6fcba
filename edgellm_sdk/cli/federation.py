"""`federation keys`, `federation serve` and `federation join`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from edgellm_sdk.cli.screen import facts
from edgellm_sdk.cli.verb import Answer, Request, Verb
from edgellm_sdk.settings import Join, Keys, Serve


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def keys(request: Request) -> Answer:
    from edgellm_sdk.steps.federation import keys as make

    settings: Keys = request.settings
    folder = Path(request.words[0])
    names = make(folder, clients=settings.clients, hosts=_split(settings.host), revoke=_split(settings.revoke))
    value = {"folder": str(folder), "clients": names}
    pairs = [
        ("server", f"{folder / 'server'}, for the machine that serves"),
        ("clients", f"{folder / 'clients'}, one folder for each; hand it over in private"),
        ("authority", f"{folder / 'authority'}, stays with you"),
        ("admitted", f"{len(names)} clients"),
    ]
    return Answer(value, facts(pairs))


def serve(request: Request) -> Answer:
    from edgellm_sdk.cli import show
    from edgellm_sdk.steps.federation import serve as run

    done = run(request.words[0], **asdict(request.settings), quiet=request.quiet)
    return Answer(done.report.to_json(), show.outcome(done))


def join(request: Request) -> Answer:
    from edgellm_sdk.cli import show
    from edgellm_sdk.steps.federation import join as run

    done = run(request.words[0], **asdict(request.settings), quiet=request.quiet)
    return Answer(done.report.to_json(), show.outcome(done))


VERBS = (
    Verb(
        "federation keys",
        "Make the certificates and keys of a federation: a server's, and one for every client.",
        keys,
        Keys,
        words="FOLDER",
        least=1,
        most=1,
    ),
    Verb(
        "federation serve",
        "Serve a recipe's finetune step to clients over the network (extra: flower).",
        serve,
        Serve,
        words="RECIPE",
        least=1,
        most=1,
        required=("output",),
    ),
    Verb(
        "federation join",
        "Take part in a federation with data that stays here (extra: flower).",
        join,
        Join,
        words="ADDRESS",
        least=1,
        most=1,
        required=("data", "output"),
    ),
)
