"""Put what a comparison has measured into docs/leaderboard.md.

    realign lab compare FAMILY -o DIR
    python benchmarks/leaderboard/publish.py DIR

The tables between the page's markers, the figures in its prose (`figures`),
docs/data/leaderboard.json and the pictures are replaced; the rest, written by hand, stays. An
incomplete comparison may be published, and the page says what is missing; with --whole a fine-tune
counts only when every method has repaired it. The tables of docs/why-methods-fail.md come from
docs/data/why-methods-fail.json, which `why.py` writes.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from figures import fill_figures
from page import fill, whole
from why_page import why_tables

from realign.lab.compare import make_board, read_cells
from realign.lab.leaderboard_json import board_json
from realign.lab.leaderboard_page import board_page
from realign.report.leaderboard import save_pictures

DOCS = Path(__file__).parents[2] / "docs"


def without(reason: str, folder: Path) -> str:
    """A reason that names no place on the machine where it was met."""
    return reason.replace(f"{folder}/", "").replace(f"{folder.resolve()}/", "")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("board", type=Path)
    parser.add_argument("--docs", type=Path, default=DOCS)
    parser.add_argument("--whole", action="store_true", help="only fine-tunes that all methods had")
    parser.add_argument("--but", default="", help="methods that --whole does not wait for")
    args = parser.parse_args()
    cells = read_cells(args.board)
    board = make_board(whole(cells, args.but.split(",")) if args.whole else cells)
    failed = {place: without(reason, args.board) for place, reason in board.failed.items()}
    board = replace(board, failed=failed)
    told = board_json(board)
    tables = {"leaderboard.md": board_page(board)}
    reasons = args.docs / "data" / "why-methods-fail.json"
    answers = json.loads(reasons.read_text(encoding="utf-8")) if reasons.is_file() else []
    if answers:
        tables["why-methods-fail.md"] = why_tables(answers)
    for name, made in tables.items():
        page = args.docs / name
        filled = fill(page.read_text(encoding="utf-8"), made)
        page.write_text(fill_figures(filled, told, answers), encoding="utf-8")
    data = json.dumps(told, separators=(",", ":"), sort_keys=True) + "\n"
    (args.docs / "data" / "leaderboard.json").write_text(data, encoding="utf-8")
    save_pictures(told, args.docs / "pictures")


if __name__ == "__main__":
    main()
