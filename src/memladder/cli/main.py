"""The command line: `memladder …`, and the two scripts of the paper's artifact.

Options are declared here; what a command does is in `actions`, imported only when a command runs,
so that `--help` answers at once. An error is one line on stderr and exit status 2.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from memladder import __version__
from memladder.cli import ending, explaining, predicting, reporting
from memladder.cli.commands.cache import show_cache
from memladder.cli.commands.dequantize import dequantize
from memladder.cli.commands.evaluate import evaluate
from memladder.cli.commands.generate import generate
from memladder.core.case import MAX_BATCH_SIZE, MAX_PAST, MAX_SEQ_LEN
from memladder.core.errors import UsageError


def _app(text: str, *, completion: bool = False) -> typer.Typer:
    """An application whose options and commands are typed with `-` or `_` alike."""
    return typer.Typer(
        help=text,
        add_completion=completion,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={
            "help_option_names": ["-h", "--help"],
            "token_normalize_func": lambda token: token.replace("_", "-"),
        },
    )


app = _app(
    "How much memory an LLM layer needs under an inference framework, measured.", completion=True
)
_run_all_app = _app("Draw Figure 11 from the published data, or measure it here and draw that.")
_measure_app = _app("Measure the memory of one decoder layer under one framework, at one shape.")

_env_app = _app("Environments of frameworks' own: made, pointed to, listed, removed.")
app.add_typer(_env_app, name="env")
predicting.register(app)
explaining.register(app)
reporting.register(app)

EnvironmentOf = Annotated[
    str, typer.Argument(metavar="FRAMEWORK", help="A framework's key; its variants share one.")
]
Model = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="NAME|PATH",
        help="llama, bloom, or any decoder's config.json or its folder.",
    ),
]
Layer = Annotated[
    str | None,
    typer.Option("--layer", metavar="N", help="Which layer, from 0; default: the usual one."),
]
Layers = Annotated[
    str,
    typer.Option(
        "--layers",
        metavar="all|N",
        help="A model's all or first N layers with embeddings and head; 1: a layer alone.",
    ),
]
Past = Annotated[
    str,
    typer.Option("--past", metavar="N", help="Tokens of each sequence in a key-value cache."),
]
Framework = Annotated[
    str, typer.Option("--framework", help="A framework's key; `memladder frameworks` lists them.")
]
BatchSize = Annotated[
    str, typer.Option("--batch_size", "--batch-size", metavar="N", help="Sequences in the batch.")
]
SeqLen = Annotated[
    str, typer.Option("--seq_len", "--seq-len", metavar="N", help="Tokens in each sequence.")
]
Models = Annotated[
    str | None, typer.Option(metavar="NAME|PATH,…", help="Models; default: llama,bloom.")
]
Frameworks = Annotated[
    str | None,
    typer.Option(metavar="KEY,…|all", help="Frameworks; default: the figure's twelve systems."),
]
Shapes = Annotated[
    str | None,
    typer.Option(metavar="BxS[+P],…", help="Shapes, P of a past; default: 1x1,32x1,1x4096."),
]
Device = Annotated[
    str, typer.Option(metavar="auto|cuda|cuda:N|cpu", help="Where to run; auto prefers a GPU.")
]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Measure again what log/ already has for this environment.")
]
Retry = Annotated[
    str | None,
    typer.Option(metavar="STATUS,…", help="Also measure again what ended so, e.g. oom,failed."),
]
Repeats = Annotated[str, typer.Option(metavar="N", help="Processes per case; the median counts.")]
Timeout = Annotated[str, typer.Option(metavar="SECONDS", help="Time limit of one process.")]
OutputDir = Annotated[Path, typer.Option(help="Where log/, png/ and pdf/ are written.")]
Config = Annotated[
    Path | None, typer.Option(metavar="FILE", help="A Hugging Face config.json of another size.")
]
CacheDir = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Weights and exported models are cached here.")
]
Results = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Also merge the records into this file.")
]
StorePath = Annotated[
    Path, typer.Argument(metavar="STORE", help="A folder such as log/ or a results file.")
]

_HERE = Path()
_DEFAULT_TIMEOUT = "1800"
MAX_REPEATS = 100
MAX_LAYER = (1 << 20) - 1
MAX_MIB = 1 << 30


@app.command()
def figure(
    store: Annotated[
        Path | None, typer.Argument(metavar="[STORE]", help="Records to draw; default: published.")
    ] = None,
    output_dir: OutputDir = _HERE,
) -> None:
    """Draw Figure 11: published, or from the records in STORE."""
    from memladder.cli import actions

    if store is None:
        actions.draw_published(output_dir)
    else:
        actions.draw_store(store, output_dir)


@app.command()
@_measure_app.command()
def measure(
    model: Model = "llama",
    framework: Framework = "pytorch",
    batch_size: BatchSize = "1",
    seq_len: SeqLen = "1",
    past: Past = "0",
    layer: Layer = None,
    layers: Layers = "1",
    device: Device = "auto",
    config: Config = None,
    repeats: Repeats = "1",
    timeout: Timeout = _DEFAULT_TIMEOUT,
    output_dir: OutputDir = _HERE,
    cache_dir: CacheDir = None,
) -> None:
    """Measure one cell; its record goes to log/."""
    from memladder.cli import actions
    from memladder.sweeps import subjects

    request = actions.Request(
        models=model,
        frameworks=framework,
        shapes="x".join(
            str(_count(name, text, limit))
            for name, text, limit in (
                ("batch_size", batch_size, MAX_BATCH_SIZE),
                ("seq_len", seq_len, MAX_SEQ_LEN),
            )
        )
        + f"+{_count('past', past, MAX_PAST, least=0)}",
        device=device,
        config=config,
        layer=None if layer is None else _count("layer", layer, MAX_LAYER, least=0),
        layers=subjects.parse_scope(layers),
        repeats=_count("repeats", repeats, MAX_REPEATS),
        timeout_s=_seconds(timeout),
        output_dir=output_dir,
        cache_dir=cache_dir,
        fresh=True,
    )
    raise typer.Exit(actions.measure(request))


@app.command()
def sweep(
    models: Models = None,
    frameworks: Frameworks = None,
    shapes: Shapes = None,
    device: Device = "auto",
    fresh: Fresh = False,
    retry: Retry = None,
    config: Config = None,
    repeats: Repeats = "1",
    timeout: Timeout = _DEFAULT_TIMEOUT,
    output_dir: OutputDir = _HERE,
    cache_dir: CacheDir = None,
    results: Results = None,
    layers: Layers = "1",
) -> None:
    """Measure the figure's cases here and draw them; resumes."""
    from memladder.cli import actions
    from memladder.sweeps import subjects

    request = actions.Request(
        models=models,
        frameworks=frameworks,
        shapes=shapes,
        device=device,
        config=config,
        repeats=_count("repeats", repeats, MAX_REPEATS),
        timeout_s=_seconds(timeout),
        output_dir=output_dir,
        cache_dir=cache_dir,
        fresh=fresh,
        retry=retry,
        results=results,
        layers=subjects.parse_scope(layers),
    )
    raise typer.Exit(actions.sweep(request))


@_run_all_app.command()
def _run_all(
    context: typer.Context,
    reproduce: Annotated[
        bool, typer.Option("--reproduce", help="Measure on this machine, then draw.")
    ] = False,
    models: Models = None,
    frameworks: Frameworks = None,
    shapes: Shapes = None,
    device: Device = "auto",
    fresh: Fresh = False,
    retry: Retry = None,
    config: Config = None,
    repeats: Repeats = "1",
    timeout: Timeout = _DEFAULT_TIMEOUT,
    output_dir: OutputDir = _HERE,
    cache_dir: CacheDir = None,
    results: Results = None,
) -> None:
    """Draw Figure 11 from the published data; with --reproduce, measure it here and draw that."""
    if reproduce:
        sweep(
            models, frameworks, shapes, device, fresh, retry, config,
            repeats, timeout, output_dir, cache_dir, results,
        )  # fmt: skip
    given = [
        f"--{name.replace('_', '-')}"
        for name in context.params
        if name not in ("reproduce", "output_dir")
        and str(getattr(context.get_parameter_source(name), "name", "")) == "COMMANDLINE"
    ]
    if given:
        raise UsageError(f"{', '.join(given)} measures, so it needs --reproduce")
    figure(None, output_dir)


@app.command()
def verify(
    frameworks: Frameworks = None,
    device: Device = "auto",
    timeout: Timeout = _DEFAULT_TIMEOUT,
    output_dir: OutputDir = _HERE,
    cache_dir: CacheDir = None,
) -> None:
    """Compare frameworks with an fp32 reference."""
    from memladder.cli import actions

    request = actions.Request(
        frameworks=frameworks,
        device=device,
        timeout_s=_seconds(timeout),
        output_dir=output_dir,
        cache_dir=cache_dir,
    )
    raise typer.Exit(actions.verify(request))


@app.command()
def tune(
    models: Models = None,
    frameworks: Frameworks = None,
    shapes: Shapes = None,
    device: Device = "cuda",
    cache_dir: CacheDir = None,
) -> None:
    """Measure which cuts of Ladder's kernels are fastest on this GPU, and keep them."""
    from memladder.cli import actions

    request = actions.Request(
        models=models,
        frameworks=frameworks,
        shapes=shapes,
        device=device,
        cache_dir=cache_dir,
    )
    raise typer.Exit(actions.tune(request))


@app.command("frameworks")
def list_frameworks(device: Device = "auto") -> None:
    """What can run here, and what the rest is missing."""
    from memladder.cli import actions

    actions.show_frameworks(device)


@app.command()
def show(
    record: Annotated[Path, typer.Argument(metavar="RECORD", help="A record's JSON file.")],
) -> None:
    """Explain one record: phases, settings, quality."""
    from memladder.cli import actions

    actions.show_record(record)


@app.command()
def table(
    store: StorePath,
    form: Annotated[str, typer.Option("--format", metavar="md|csv|json")] = "md",
) -> None:
    """Print a row for every case in STORE."""
    from memladder.cli import actions

    actions.print_table(store, form)


@app.command()
def floor(store: StorePath) -> None:
    """Hold the engine's cells in STORE against their budget."""
    from memladder.cli import actions

    raise typer.Exit(actions.show_floor(store))


@app.command()
def quantize(
    checkpoint: Annotated[
        Path,
        typer.Argument(metavar="CHECKPOINT", help="A folder with config.json and safetensors."),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Where the packed file is written.")
    ],
    layer: Annotated[str, typer.Option(metavar="N", help="Which decoder layer, from 0.")] = "0",
    whole: Annotated[
        bool, typer.Option("--all", help="All layers, embeddings and head: a model that runs.")
    ] = False,
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="With --all: matrices that stay in fp16."),
    ] = None,
    head_format: Annotated[
        str, typer.Option(metavar="FORMAT", help="With --all: of the head, and of tied embeddings.")
    ] = "fp16",
    form: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="int4, nf4, mxfp4, … and parameters: int4:group_size=64.",
        ),
    ] = "int4",
) -> None:
    """Pack a layer of a local checkpoint in a number format, or all of it."""
    from memladder.cli import quantizing
    from memladder.cli.commands import quantize_all

    if whole:
        kept = tuple(keep or ())
        quantize_all.quantize_all(checkpoint, out, form=form, kept=kept, head_format=head_format)
        return
    if keep or head_format != "fp16":
        raise UsageError("--keep and --head-format are for --all")

    quantizing.quantize(checkpoint, _count("layer", layer, MAX_LAYER, least=0), form, out)


@app.command("compile")
def compile_layer(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A decoder layer as .onnx.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new folder.")],
    engine: Annotated[str, typer.Option(metavar="welder|ladder")] = "ladder",
    form: Annotated[str, typer.Option("--format", metavar="FORMAT", help="Of weights.")] = "fp16",
    activation: Annotated[
        str | None, typer.Option(metavar="FORMAT", help="Default: what goes with the weights.")
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Matrices that stay in fp16; may be repeated."),
    ] = None,
    memory_budget: Annotated[
        str | None, typer.Option(metavar="MIB", help="Of the arena; default: the knee.")
    ] = None,
) -> None:
    """Compile a layer from ONNX: program, packed weights, schedule."""
    from memladder.cli import compiling

    budget = None
    if memory_budget is not None:
        budget = _count("memory budget", memory_budget, MAX_MIB) << 20
    compiling.compile_model(
        model,
        out,
        engine=engine,
        form=form,
        activation=activation,
        kept=tuple(keep or ()),
        budget=budget,
    )


@app.command("run")
def run_layer(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `compile` has written.")],
    given: Annotated[Path, typer.Option("--input", metavar="X.NPY", help="Hidden states.")],
    out: Annotated[Path, typer.Option("--output", metavar="Y.NPY")],
    device: Annotated[
        str | None, typer.Option(metavar="cpu|cuda:N", help="Default: a GPU where there is one.")
    ] = None,
    check: Annotated[
        str, typer.Option(metavar="output|steps|none", help="Where to look for NaN and infinity.")
    ] = "output",
) -> None:
    """Run a compiled layer on a GPU, or on the CPU."""
    from memladder.cli import compiling

    compiling.run_folder(folder, given, out, device, check)


app.command()(generate)
app.command()(evaluate)
app.command()(dequantize)
app.command("cache")(show_cache)


@app.command()
def doctor() -> None:
    """What this machine has, who uses its GPUs, what to fix."""
    from memladder.cli import actions

    raise typer.Exit(actions.doctor())


@app.command()
def calibrate(device: Device = "auto", output_dir: OutputDir = _HERE) -> None:
    """Check the meter against a worker that takes known sizes."""
    from memladder.cli import actions

    raise typer.Exit(actions.calibrate(device, output_dir))


@_env_app.command("create")
def _env_create(
    framework: EnvironmentOf,
    device: Device = "auto",
    python: Annotated[
        str | None, typer.Option(metavar="PATH", help="The Python to make it of; default: ours.")
    ] = None,
) -> None:
    """Make an environment from a framework's pinned requirements, under the cache folder."""
    from memladder.cli import env_actions

    env_actions.create(framework, device, python)


@_env_app.command("use")
def _env_use(
    framework: EnvironmentOf,
    python: Annotated[
        str, typer.Option(metavar="PATH", help="An interpreter that has the framework.")
    ],
) -> None:
    """Let a framework's workers start with an interpreter that is there already."""
    from memladder.cli import env_actions

    env_actions.use(framework, python)


@_env_app.command("list")
def _env_list() -> None:
    """Whose Python each framework runs in."""
    from memladder.cli import env_actions

    env_actions.show()


@_env_app.command("remove")
def _env_remove(framework: EnvironmentOf) -> None:
    """Delete a made environment; only forget one that was pointed to."""
    from memladder.cli import env_actions

    env_actions.remove(framework)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"memladder {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print and exit.")
    ] = False,
) -> None:
    """How much memory an LLM layer needs under an inference framework, measured."""


def _count(name: str, text: str, limit: int, least: int = 1) -> int:
    """A whole number from `least` to `limit`. Raises UsageError."""
    digits = text.strip()
    value = int(digits) if digits.isascii() and digits.isdecimal() and len(digits) <= 18 else -1
    if not least <= value <= limit:
        raise UsageError(f"{name} {text[:40]!r} is not a whole number from {least} to {limit}")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise UsageError(f"timeout {text[:40]!r} is not a positive number of seconds")
    return value


def main() -> NoReturn:
    """Entry point `memladder`."""
    ending.run(app, sys.argv[1:] or ["--help"])


def run_all() -> NoReturn:
    """Entry point `run_all.py`."""
    ending.run(_run_all_app, sys.argv[1:])


def measure_memory() -> NoReturn:
    """Entry point `measure_memory.py`."""
    ending.run(_measure_app, sys.argv[1:])
