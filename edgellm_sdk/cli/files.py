"""`compress`, `export`, `eval`, `run`, `demo` and `deploy`: what makes, measures and runs files."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellm_sdk.cli.train import installed
from edgellm_sdk.cli.verb import Answer, Request, Verb
from edgellm_sdk.errors import ConfigError, GateError, ModelError, UsageError, printable
from edgellm_sdk.settings import Compress, Demo, Deploy, Evaluate, Export, Run, Verify

if TYPE_CHECKING:
    from edgellm_sdk.steps import Outcome
    from edgellm_sdk.types import Generation, Message, Prompt, Session


MOST_USERS = 20  # named in a chat


def compress(request: Request) -> Answer:
    from edgellm_sdk import steps

    return _one(steps.compress(**asdict(request.settings), options=request.options, quiet=request.quiet))


def export(request: Request) -> Answer:
    from edgellm_sdk import steps

    return _one(steps.export(**asdict(request.settings), options=request.options, quiet=request.quiet))


def evaluate(request: Request) -> Answer:
    from edgellm_sdk import steps

    settings = asdict(request.settings)
    return _one(steps.evaluate(request.words[0], **settings, options=request.options, quiet=request.quiet))


def verify(request: Request) -> Answer:
    from edgellm_sdk.cli import show
    from edgellm_sdk.steps.verification import verify as run

    done = run(request.words[0], **asdict(request.settings), quiet=request.quiet)
    text = "\n\n".join((show.gate(done.report), show.outcome(done)))
    return Answer(done.report.to_json(), text, 0 if done.report.verified["passed"] else GateError.exit_code)


def run(request: Request) -> Answer:
    return _recipe(Path(request.words[0]), request)


def demo(request: Request) -> Answer:
    from edgellm_sdk import steps

    done = steps.demo(request.settings.output, resume=request.settings.resume, quiet=request.quiet)
    return _one(done)


def _one(done: Outcome) -> Answer:
    from edgellm_sdk.cli import show

    return Answer(done.report.to_json(), show.outcome(done))


def _recipe(recipe: Path, request: Request) -> Answer:
    """Every step of a recipe; `report.html` in the output shows them together."""
    from edgellm_sdk import steps
    from edgellm_sdk.cli import show

    folder = Path(request.settings.output)
    done = steps.run(recipe, folder, resume=request.settings.resume, quiet=request.quiet)
    text = [show.outcome(outcome) for outcome in done]
    if results := show.measured([outcome.report for outcome in done]):
        text.append(results)
    text.append(f"all steps on one page: {folder / 'report.html'}")
    return Answer([outcome.report.to_json() for outcome in done], "\n\n\n".join(text))


def deploy(request: Request) -> Answer | None:
    """Answer one prompt (given, or from a pipe), or chat on the terminal."""
    from edgellm_sdk import steps

    settings: Deploy = request.settings
    subject, action = request.words[0], (request.words[1:] or ("",))[0]
    if action not in ("", "generate", "chat"):
        raise UsageError(f"does not understand {action!r}", "edgellm deploy", "say generate or chat")
    if not settings.prompt and action != "chat" and not sys.stdin.isatty():
        settings = replace(settings, prompt=sys.stdin.read().rstrip("\n"))
    chatting = action == "chat" or (not settings.prompt and action != "generate" and sys.stdin.isatty())
    if not chatting and not settings.prompt:
        raise UsageError("needs --prompt TEXT", "edgellm deploy", "or type `chat` after the file")
    if chatting and request.json:
        raise UsageError("a chat has no JSON result", "edgellm deploy", "give --prompt TEXT")
    user, device = settings.user, settings.device
    with steps.deploy(subject, user=user, device=device, options=request.options, quiet=request.quiet) as session:
        if chatting:
            chat(session, settings)
            return None
        generation, used = answer(session, [{"role": "user", "content": settings.prompt}], settings)
        return Answer(_described(session, generation, used), _shown(generation.text))


def _described(session: Session, generation: Generation, used: int) -> Mapping[str, Any]:
    return {
        "text": generation.text,
        "stop": generation.stop,
        "tokens": len(generation.tokens),
        "prompt_tokens": used,
        "seconds": generation.seconds,
        "device": session.device,
        "stats": asdict(session.stats()),
    }


def _shown(text: str) -> str:
    """What a model wrote, unable to drive the terminal it is printed on."""
    return "\n".join(printable(line) for line in text.split("\n")) if sys.stdout.isatty() else text


def answer(session: Session, turns: Sequence[Message], settings: Deploy) -> tuple[Generation, int]:
    """The model's next turn and the number of prompt tokens. Without a chat template the last turn is continued."""
    system: list[Message] = [{"role": "system", "content": settings.system}] if settings.system else []
    prompt: Prompt = turns[-1]["content"] if settings.raw else (*system, *turns)
    try:
        tokens = session.prompt_ids(prompt)
    except ModelError as error:
        if settings.raw or "chat template" not in error.what:
            raise
        tokens = session.prompt_ids(turns[-1]["content"])
    return session.generate(tokens, settings.max_tokens, settings.temperature, settings.seed), len(tokens)


def chat(session: Session, settings: Deploy) -> None:
    """Turns until an empty line of `/quit`, or the end of input."""
    print("Type a message; an empty one or Ctrl-D ends the chat.", file=sys.stderr)
    turns: list[Message] = []
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline().strip()
        if line in ("", "/quit", "/exit"):
            return
        if line.split()[0] == "/user":
            turns.clear()  # what one user said is not the next one's to read
            print(switched(session, line.removeprefix("/user").strip()), file=sys.stderr)
            continue
        turns.append({"role": "user", "content": line})
        generation, _ = answer(session, turns, settings)
        turns.append({"role": "assistant", "content": generation.text})
        print(_shown(generation.text.strip()), flush=True)


def switched(session: Session, user: str) -> str:
    """Carry out `/user NAME`; what to tell about it. An empty name lists who there is."""
    from edgellm_sdk.users import UserSession

    if not isinstance(session, UserSession):
        return "there are no users here: give a folder that `edgellm export --users` wrote"
    if not user:
        names = [printable(name) for name in session.users]
        more = f" and {len(names) - MOST_USERS} more" if len(names) > MOST_USERS else ""
        return f"now {printable(session.user or 'nobody')}, of {', '.join(names[:MOST_USERS])}{more}"
    try:
        session.switch(user)
    except ConfigError as error:
        return str(error)
    return f"now {printable(user)}, from the beginning"


VERBS = (
    Verb(
        "compress",
        "Make a model smaller.",
        compress,
        Compress,
        required=("plugin", "model", "output"),
        plugin="plugin",
        stage="compress",
        more=lambda: installed("compress"),
    ),
    Verb(
        "export",
        "Write the file a device runs, and prove that it behaves like the model.",
        export,
        Export,
        required=("plugin", "model", "output"),
        plugin="plugin",
        stage="export",
        more=lambda: installed("export"),
    ),
    Verb(
        "deploy",
        "Run a model or an exported file: answer a prompt, or chat.",
        deploy,
        Deploy,
        words="FILE [generate|chat]",
        least=1,
        most=2,
        plugin="device",
        stage="deploy",
    ),
    Verb(
        "eval",
        "Measure a model or an exported file on held-out data.",
        evaluate,
        Evaluate,
        words="MODEL",
        least=1,
        most=1,
        required=("data",),
        plugin="device",
        stage="deploy",
    ),
    Verb(
        "verify",
        "Does a GGUF file that somebody made behave like the model it is said to be?",
        verify,
        Verify,
        words="FILE.gguf",
        least=1,
        most=1,
        required=("against",),
    ),
    Verb(
        "run",
        "Carry out a recipe: a TOML file of steps in order.",
        run,
        Run,
        words="RECIPE.toml",
        least=1,
        most=1,
        required=("output",),
    ),
    Verb("demo", "The on-device spam filter, from private messages to a proven file, in minutes.", demo, Demo),
)
