"""The pages in docs/commands, made from the same source as `--help`.

`python -m realign_cli.pages docs/commands` writes them; a test holds them current. Only what a
command says about itself is used, so a page cannot drift from the program.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer

from realign_cli.command import PAGES, Page
from realign_cli.main import app

_HEADER = "<!-- Made by `make docs` from the command's own help. Do not edit. -->\n"


def render_all() -> dict[str, str]:
    """Return every page by file name, the index as README.md."""
    root: Any = typer.main.get_command(app)
    commands = dict(_walk(root))
    pages = {
        f"{name.replace(' ', '-')}.md": _page(PAGES[name], command)
        for name, command in commands.items()
    }
    pages["README.md"] = _index(commands)
    return pages


def write_all(folder: Path) -> None:
    """Write the pages, and remove those of commands that are gone."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = render_all()
    for stale in set(folder.glob("*.md")) - {folder / name for name in pages}:
        stale.unlink()
    for name, text in pages.items():
        (folder / name).write_text(text, "utf-8")


def main() -> None:
    """Write the pages into the folder that the command line names."""
    parser = argparse.ArgumentParser(description="Write the pages of the commands.")
    parser.add_argument("folder", type=Path, help="as docs/commands")
    write_all(parser.parse_args().folder)


def _walk(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        full = f"{prefix} {name}".strip()
        if getattr(command, "commands", None):
            yield from _walk(command, full)
        else:
            yield full, command


def _page(page: Page, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option"]
    usage = " ".join(
        [
            "realign",
            page.name,
            *(f"[{a.metavar}]" if not a.required else a.metavar for a in arguments),
        ]
    )
    lines = [_HEADER, f"# realign {page.name}\n", f"{command.help.strip()}\n"]
    lines += [f"```\n{usage} [OPTIONS]\n```\n", "## Examples\n"]
    for example in page.examples:
        does = example.does[0].upper() + example.does[1:]
        lines.append(f"{does}:\n\n```sh\n{example.line}\n```\n")
    if page.notes.strip():
        lines.append(f"## How it works\n\n{page.notes.strip()}\n")
    lines.append("## Options\n")
    if arguments:
        lines.append("| argument | |\n|---|---|")
        lines += [f"| `{a.metavar}` | {_cell(a.help)} |" for a in arguments]
        lines.append("")
    for panel, members in _by_panel(options).items():
        lines.append(f"**{panel}**\n\n| option | | default |\n|---|---|---|")
        lines += [_option_row(each) for each in members]
        lines.append("")
    lines.append(
        "Every option can also come from a TOML file (`--config FILE`), with its name as the key."
    )
    return "\n".join(lines).rstrip() + "\n"


def _by_panel(options: list[Any]) -> Mapping[str, list[Any]]:
    panels: dict[str, list[Any]] = {}
    for option in options:
        panels.setdefault(option.rich_help_panel or "Options", []).append(option)
    return panels


def _option_row(option: Any) -> str:
    names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    value = f" `{option.metavar}`" if option.metavar else ""
    text = option.help or ""
    nothing = option.default is None or option.default is False or option.default == ()
    default = "" if nothing else f"`{option.default}`"
    if "(default:" in text:
        text, _, own = text.partition("(default:")
        default = own.rpartition(")")[0].strip() or own.strip()
    if option.required:
        default = "required"
    return f"| {names}{value} | {_cell(text)} | {_cell(default)} |"


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


def _index(commands: Mapping[str, Any]) -> str:
    rows = [
        f"| [`realign {name}`]({name.replace(' ', '-')}.md) | {_first_sentence(command.help)} |"
        for name, command in commands.items()
    ]
    text = [
        _HEADER,
        "# Commands\n",
        "| command | |\n|---|---|",
        *rows,
        "",
        "Data goes to standard output, everything else to standard error; `--json` gives one JSON",
        "document. Exit codes: 0 done and within policy; 1 a gate failed or is inconclusive, or an",
        "edit that changed nothing; 2 could not complete. `NO_COLOR`, `HF_TOKEN`, `HF_HOME`,",
        "`HF_ENDPOINT` and `HF_HUB_OFFLINE` are respected; `REALIGN_DEBUG=1` shows tracebacks.",
    ]
    return "\n".join(text) + "\n"


def _first_sentence(text: str) -> str:
    return _cell(text.strip().split("\n\n")[0])


if __name__ == "__main__":
    main()
