"""Run one command and say what it cost: wall, CPU, memory, bytes read and written.

    python -I -S launch.py RESULT.json LOG COMMAND...

A process of its own without any library, because a child's peak memory includes, until it executes
its program, that of the process that started it. Linux only: it reads /proc.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path

INTERVAL = 0.1  # seconds between looks at the process tree


def descendants(pid: int) -> list[int]:
    """`pid` and all processes below it."""
    found = [pid]
    for parent in found:
        try:
            for file in Path(f"/proc/{parent}/task").glob("*/children"):
                found += map(int, file.read_text().split())
        except OSError:  # it has ended
            continue
    return found


def status(pid: int) -> dict[str, int]:
    """Bytes of memory by the kernel's name for them."""
    try:
        with Path(f"/proc/{pid}/status").open() as file:
            lines = [
                line.split() for line in file if line.startswith(("VmHWM", "VmRSS", "RssAnon"))
            ]
    except OSError:
        return {}
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines}


def watch(pid: int, seen: dict[str, int], done: threading.Event) -> None:
    """Follow the tree: its resident memory at any one time, and the anonymous part of it."""
    while not done.wait(INTERVAL):
        tree = [status(each) for each in descendants(pid)]
        tree = [each for each in tree if each]
        seen["processes"] = max(seen["processes"], len(tree))
        for key, name in (("tree", "VmRSS"), ("anonymous", "RssAnon")):
            seen[key] = max(seen[key], sum(each.get(name, 0) for each in tree))


def input_output(pid: int) -> dict[str, int]:
    """What passed through read and write calls; readable until the process is reaped."""
    try:
        with Path(f"/proc/{pid}/io").open() as file:
            lines = dict(line.split(": ") for line in file)
    except OSError:
        return {}
    return {"read": int(lines["rchar"]), "written": int(lines["wchar"])}


def main() -> None:
    result, log, *command = sys.argv[1:]
    seen = {"processes": 1, "tree": 0, "anonymous": 0}
    done = threading.Event()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    start = time.perf_counter()
    pid = os.fork()
    if not pid:
        os.dup2(output, 1)
        os.dup2(output, 2)
        try:
            os.execvp(command[0], command)
        finally:
            os._exit(127)
    watcher = threading.Thread(target=watch, args=(pid, seen, done))
    watcher.start()
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    wall = time.perf_counter() - start
    passed = input_output(pid)
    _, code, usage = os.wait4(pid, 0)
    done.set()
    watcher.join()
    facts = {
        "exit": os.waitstatus_to_exitcode(code),
        "wall": wall,
        "user": usage.ru_utime,
        "system": usage.ru_stime,
        "peak_rss": usage.ru_maxrss * 1024,
        "peak_tree": max(seen["tree"], usage.ru_maxrss * 1024),
        "peak_anonymous_sampled": seen["anonymous"],
        "processes": seen["processes"],
        "bytes_read": passed.get("read"),
        "bytes_written": passed.get("written"),
        "disk_written": usage.ru_oublock * 512,
    }
    Path(result).write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
