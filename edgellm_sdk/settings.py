"""The settings of every verb, declared as plugins declare their options: help text and bounds live here only."""

from __future__ import annotations

from dataclasses import dataclass

from edgellm_sdk.config import opt

MODEL = "HF folder, run folder, GGUF file, hub id, or the alias smollm2-135m"
DATA = "JSONL or CSV file, folder with train/valid/test files, or the built-in sms-spam"
SEED = "every random draw is a function of it"
RESUME = "continue a stopped run; it ends in the same bytes"
DRY_RUN = "check everything and print the plan, compute nothing"
TASK_PROMPT = "question asked about each text of labelled data, with {text} and, if wanted, {labels}"
BALANCE = "use as many examples of every label as the rarest has"


@dataclass(frozen=True)
class Finetune:
    plugin: str = opt("", "the method; `edgellm plugins list` shows what there is")
    model: str = opt("", MODEL)
    data: str = opt("", DATA)
    output: str = opt("", "run folder to write")
    clients: int = opt(1, "clients the data is dealt to; 1 is plain fine-tuning", ge=1, le=100_000)
    rounds: int = opt(0, "federated rounds; 0 leaves the default of 100", ge=0)
    clients_per_round: int = opt(0, "clients sampled each round; 0 takes all", ge=0)
    partition: str = opt("iid", "how the data is dealt: iid, dirichlet:ALPHA, skew:ALPHA, label:K or user")
    seed: int = opt(0, SEED, ge=0)
    device: str = opt("cpu", "cpu or cuda, or a backend that only infers, as llama_cpp with its --llama-cpp-NAME")
    aggregate: str = opt("", "another plugin that aggregates, in place of the method's own rule")
    around: str = opt("", "plugins that work around the method, comma-separated, outermost last: dp, fedprox, ...")
    balance: bool = opt(False, BALANCE)
    task_prompt: str = opt("", TASK_PROMPT)
    resume: bool = opt(False, RESUME)
    dry_run: bool = opt(False, DRY_RUN)
    profiles: str = opt("", "TOML file that tells what clients have: memory, cores, link")
    quorum: float = opt(0.5, "share of a round's clients that must answer", ge=0.01, le=1)
    memory: int = opt(0, "budget for what a method may keep in memory; 0 sets none", unit="MB", ge=0)
    hidden: str = opt("", "folder that keeps frozen layers' hidden states for later runs; they tell of the texts")
    watch: int = opt(10, "measure on held-out data every so many rounds; 0 never", unit="rounds", ge=0)
    engine: str = opt("process", "process, or simulation: Flower's, on all cores", choices=("process", "simulation"))
    keep_wire: bool = opt(False, "keep every update as it was sent, for edgellm audit wire")
    personalise: int = opt(
        0, "local steps (rounds, for a method without) of every client after the federation, for an adapter of its own",
        unit="steps", ge=0, le=1_000_000,
    )  # fmt: skip
    kept_aside: float = opt(
        0.2, "with --personalise: share of each client's examples kept to choose and to report on", ge=0.01, le=0.9
    )


@dataclass(frozen=True)
class Aggregate:
    plugin: str = opt("", "the rule that combines them")
    output: str = opt("", "folder to write")


@dataclass(frozen=True)
class Compress:
    plugin: str = opt("", "the method; `edgellm plugins list` shows what there is")
    model: str = opt("", MODEL)
    output: str = opt("", "run folder to write")
    data: str = opt("", "calibration data; empty uses what the model was tuned on, if that is known")
    task_prompt: str = opt("", TASK_PROMPT)
    seed: int = opt(0, SEED, ge=0)
    resume: bool = opt(False, RESUME)
    dry_run: bool = opt(False, DRY_RUN)


@dataclass(frozen=True)
class Export:
    plugin: str = opt("", "the file format")
    model: str = opt("", MODEL)
    output: str = opt("", "file to write")
    data: str = opt("", "data whose prompts the gate compares on; empty uses what the model was tuned on, if known")
    task_prompt: str = opt("", TASK_PROMPT)
    gate: bool = opt(True, "run the written file and refuse it if it does not behave like the model")
    users: bool = opt(False, "of a run with --personalise: a folder of one base, each user's adapter and a manifest")
    gate_users: int = opt(0, "with --users: adapters the gate runs, drawn at random; 0 runs all", ge=0)
    seed: int = opt(0, SEED, ge=0)
    dry_run: bool = opt(False, DRY_RUN)


@dataclass(frozen=True)
class Evaluate:
    data: str = opt("", DATA)
    output: str = opt("", "folder for the report; empty writes none")
    device: str = opt("", "backend plugin that runs it; empty chooses by format")
    split: str = opt("test", "part of the data", choices=("train", "valid", "test"))
    limit: int = opt(0, "use this many examples at most; 0 uses all", unit="examples", ge=0)
    balance: bool = opt(False, BALANCE)
    task_prompt: str = opt("", TASK_PROMPT)
    seed: int = opt(0, SEED, ge=0)


@dataclass(frozen=True)
class Verify:
    against: str = opt("", "the model that the file is said to be: " + MODEL)
    output: str = opt("", "folder for the report; empty writes none")
    data: str = opt("", "its held-out prompts are compared; empty takes those of the model's own data, else ours")
    task_prompt: str = opt("", TASK_PROMPT)
    seed: int = opt(0, SEED, ge=0)


@dataclass(frozen=True)
class Deploy:
    prompt: str = opt("", "text to answer; without it, standard input or a chat on the terminal")
    user: str = opt("", "of a folder that export --users wrote: whose adapter; in a chat, /user NAME changes it")
    device: str = opt("", "backend plugin that runs it; empty chooses by format")
    system: str = opt("", "system message put before the prompt")
    raw: bool = opt(False, "continue the prompt as plain text, without the model's chat template")
    max_tokens: int = opt(128, "longest answer", unit="tokens", ge=1, le=100_000)
    temperature: float = opt(0.0, "0 always takes the likeliest token", ge=0, le=10)
    seed: int = opt(0, SEED, ge=0)


@dataclass(frozen=True)
class Run:
    output: str = opt("", "folder that gets one run folder for each step")
    resume: bool = opt(False, RESUME)


@dataclass(frozen=True)
class Demo:
    output: str = opt("runs/demo", "folder to write")
    resume: bool = opt(False, RESUME)


@dataclass(frozen=True)
class NewPlugin:
    stage: str = opt("finetune", "what the method does", choices=("finetune", "aggregate", "compress", "export"))
    output: str = opt("", "folder to create; empty means one named like the plugin, here")


@dataclass(frozen=True)
class DataInfo:
    split: str = opt("train", "part of the data", choices=("train", "valid", "test"))
    task_prompt: str = opt("", TASK_PROMPT)


@dataclass(frozen=True)
class Compare:
    plugins: str = opt("", "methods at their defaults, comma-separated; others come from ARMS.toml, [arms.NAME] tables")
    model: str = opt("", MODEL)
    data: str = opt("", "tasks, comma-separated: " + DATA)
    output: str = opt("", "folder to write; finished runs in it are kept")
    equal: str = opt("forwards", "what every method gets as much of", choices=("time", "forwards", "bytes", "memory"))
    budget: float = opt(2000.0, "of each run: seconds, forwards, bytes both ways, or MB", ge=1)
    seconds: float = opt(60.0, "with equal memory: how long each run trains", unit="s", ge=1)
    seeds: int = opt(5, "runs of each method on each task", ge=1, le=100)
    clients: int = opt(1, "clients the data is dealt to", ge=1, le=100_000)
    partition: str = opt("iid", "how the data is dealt: iid, dirichlet:ALPHA, skew:ALPHA, label:K or user")
    balance: bool = opt(False, BALANCE)
    task_prompt: str = opt("", TASK_PROMPT)


@dataclass(frozen=True)
class BenchDevice:
    output: str = opt("", "folder to write")
    data: str = opt("", "its held-out part is scored: " + DATA)
    text: str = opt("", "text file for perplexity; empty takes the held-out part of the data")
    against: str = opt("", "unquantised model or file that divergence is measured from")
    device: str = opt("llama_cpp", "backend plugin that runs the files")
    chunk: int = opt(512, "length of a chunk, of which the second half is scored", unit="tokens", ge=8, le=32_768)
    chunks: int = opt(16, "chunks of the text at most", ge=1, le=100_000)
    tokens: int = opt(64, "tokens to generate for the speed", unit="tokens", ge=1, le=4096)
    turns: int = opt(3, "times that every file's speed is taken", ge=1, le=100)
    limit: int = opt(0, "score this many examples at most; 0 scores all", unit="examples", ge=0)
    task_prompt: str = opt("", TASK_PROMPT)
    seed: int = opt(0, SEED, ge=0)
    resume: bool = opt(False, RESUME)


@dataclass(frozen=True)
class Keys:
    clients: int = opt(0, "how many clients get a key; existing keys are kept", ge=0, le=10_000)
    host: str = opt("", "names and addresses by which clients will reach the server, comma-separated")
    revoke: str = opt("", "clients that are no longer admitted, comma-separated")


@dataclass(frozen=True)
class Serve:
    output: str = opt("", "run folder to write")
    address: str = opt("127.0.0.1:9092", "where to listen, as HOST:PORT; 0.0.0.0:PORT for every network")
    keys: str = opt("", "the server's folder of those that `edgellm federation keys` made")
    insecure: bool = opt(False, "no TLS and no keys; on loopback only, and the report says so")
    wait: float = opt(300.0, "how long to wait for the recipe's clients", unit="s", ge=1, le=604_800)
    deadline: float = opt(
        3600.0, "of a round, and of personalising; who is silent is left out", unit="s", ge=1, le=604_800
    )
    grace: float = opt(15.0, "how long a client may be away before its round goes on without it", unit="s", ge=0)
    limit: int = opt(1024, "largest message", unit="MB", ge=1, le=65_536)
    keep_wire: bool = opt(False, "keep every update as it came, for edgellm audit wire")
    resume: bool = opt(False, RESUME)


@dataclass(frozen=True)
class Join:
    data: str = opt("", DATA + "; it stays here")
    output: str = opt("", "run folder to write: what was sent, and the personalised model")
    model: str = opt("", MODEL + "; empty takes the server's, if that is a hub id or the alias")
    keys: str = opt("", "this client's folder of those that `edgellm federation keys` made")
    insecure: bool = opt(False, "no TLS and no keys; on loopback only")
    name: str = opt("", "this client's name; with keys it is that of the certificate")
    plugin: str = opt("", "take part only if this is the method; empty takes any that is installed")
    shard: str = opt("", "I/N: use only part I (from 0) of the data, as dealt to N clients; for trying things out")
    device: str = opt("cpu", "cpu or cuda, or a backend that only infers")
    memory: int = opt(0, "budget for what a method may keep in memory; 0 sets none", unit="MB", ge=0)
    patience: float = opt(600.0, "how long the server may be away", unit="s", ge=0, le=604_800)
    keep: int = opt(1024, "keep what was sent up to this size; the list is always whole", unit="MB", ge=1)
    resume: bool = opt(False, "take part again with a folder that was used before")


IN_RECIPES = {"finetune": Finetune, "compress": Compress, "export": Export, "eval": Evaluate}
