"""The `manta` command. Each subcommand imports what it needs when it runs: `--help` is instant."""

from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Serve language models on Ray, talk to them, measure them.",
    epilog="Start with `manta doctor`, then `manta serve`, and open http://localhost:8000.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
)

_PASS_ON: dict[str, Any] = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "help_option_names": [],  # the script behind the command has its own
}


def _complete_option(incomplete: str) -> list[str]:
    """Fields of AppArgs, as far as they are typed, and the values of those that have few."""
    from deployments.cli.serve import completions

    return completions(incomplete)


def _complete_benchmark(incomplete: str) -> list[tuple[str, str]]:
    from deployments.cli.bench import benchmarks

    return [(name, text) for name, text in benchmarks().items() if name.startswith(incomplete)]


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="Hub id or checkpoint directory.")] = "manta-demo",
    options: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=VALUE]…",
            help="Any field of AppArgs, such as max_model_len=4096.",
            autocompletion=_complete_option,
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    haproxy: Annotated[
        bool | None,
        typer.Option(
            help="Route through HAProxy: prefix-aware, and faster streams. Default: with a Ray of "
            "its own, if it can."
        ),
    ] = None,
    address: Annotated[
        str,
        typer.Option(help="Ray cluster; 'local' starts one, 'auto' joins the one that runs here."),
    ] = "local",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the Serve config instead of running it.")
    ] = False,
) -> None:
    """Serve a model, with the playground at `/` and an OpenAI-compatible API under `/v1`.

    Ctrl-C or SIGTERM stops it when what it is answering has ended; a second one, at once. Examples:

    * `manta serve` — the bundled demo model

    * `manta serve Qwen/Qwen3-0.6B max_model_len=4096` — a model from the Hugging Face hub

    * `manta serve ./my-checkpoint tensor_parallel_size=2 --host 0.0.0.0`

    * `manta serve Qwen/Qwen3-8B num_replicas=4 --dry-run > serve.yaml` — for `serve deploy`
    """
    from deployments.cli.serve import run

    run(model, options or [], host, port, haproxy, address, dry_run)


@app.command()
def chat(
    url: Annotated[str, typer.Option(help="The server.")] = "http://localhost:8000",
    model: Annotated[str, typer.Option(help="Which one, if the server has several.")] = "",
    system: Annotated[str, typer.Option(help="System prompt.")] = "",
    temperature: Annotated[float | None, typer.Option(min=0, help="0 is greedy.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.")] = None,
    think: Annotated[bool, typer.Option("--think", help="Let the model reason first.")] = False,
    key: Annotated[
        str, typer.Option(envvar="MANTA_API_KEY", help="API key, if the server wants one.")
    ] = "",
) -> None:
    """Chat with a running server in the terminal.

    Ctrl-C stops an answer, Ctrl-D ends the chat; arrow keys bring back earlier messages, and
    `/help` lists what else there is.
    """
    from deployments.cli.terminal_chat import Chat

    sampling = {"temperature": temperature, "max_tokens": max_tokens}
    Chat(url, key, model, system, sampling, think).run()


@app.command(context_settings=_PASS_ON)
def bench(
    context: typer.Context,
    name: Annotated[
        str | None,
        typer.Argument(help="Which one; none lists them.", autocompletion=_complete_benchmark),
    ] = None,
) -> None:
    """Run a benchmark: `manta bench` lists them, `manta bench NAME --help` explains one.

    `manta bench serving --url http://localhost:8000 --plot load.svg` draws throughput and latency
    of a running server over the number of clients.
    """
    from deployments.cli.bench import run

    run(name, context.args)


@app.command()
def doctor(
    model: Annotated[
        str | None, typer.Argument(help="Say what serving this takes, without loading it.")
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME=VALUE]…", autocompletion=_complete_option),
    ] = None,
) -> None:
    """Say what this machine has, what Manta will use of it, and what would make it faster."""
    from deployments.cli.doctor import run

    run(model, options or [])


def main() -> None:
    app()
