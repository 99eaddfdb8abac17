"""Plant the faults of `tests/slips` in a copy of the package, and see which ones the tests notice.

    python tests/plant_slips.py --area bench -n 2
    python tests/plant_slips.py --sample 120 --seed 1

pytest does not run this script, because each fault takes a few seconds. The exit status is 1 if the
tests notice fewer than 95 % of the faults.
"""

import argparse
import json
import os
import random
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory

from tqdm import tqdm

LISTS = Path(__file__).resolve().parent / "slips"
ROOT = LISTS.parent.parent
AREAS = sorted(path.stem for path in LISTS.glob("*.py") if path.stem != "slip")
sys.path.insert(0, str(LISTS))  # the files in this folder import `slip`
from slip import Slip  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--area", nargs="+", choices=AREAS, default=AREAS, help="only these lists")
    parser.add_argument("--only", metavar="TEXT", default="", help="only sentences that have TEXT")
    parser.add_argument("--sample", type=int, metavar="N", help="only N of them, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample")
    parser.add_argument("-n", type=int, default=1, metavar="JOBS", help="how many run at a time")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    slips = [(area, s) for area in args.area for s in slips_of(area) if args.only in s.what]
    if args.sample:
        slips = random.Random(args.seed).sample(slips, min(args.sample, len(slips)))
    sources = read_sources(ROOT)
    errors = [slip.what for _, slip in slips if len(places(sources, slip)) != 1]
    if errors or not slips:
        parser.error("\n".join(["no fault, or its text is not in exactly one place:", *errors]))
    unharmed = [*dict.fromkeys((slip.tests, None) for _, slip in slips)]
    outcomes = run_all(unharmed + [(slip.tests, slip) for _, slip in slips], args.n)
    failing = {tests for (tests, _), outcome in zip(unharmed, outcomes) if outcome != "unnoticed"}
    rows = [
        {"area": area, "outcome": "broken" if slip.tests in failing else o, **slip._asdict()}
        for (area, slip), o in zip(slips, outcomes[len(unharmed) :], strict=True)
    ]
    share = sum(row["outcome"] == "noticed" for row in rows) / len(rows)
    low, high = wilson_interval(share, len(rows))
    if args.json:
        print(json.dumps({"share": share, "interval": [low, high], "slips": rows}, indent=1))
    else:
        print(table(rows), f"95 % interval: {low:.1%} to {high:.1%}", sep="\n")
    return int(share < 0.95)


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share that was measured in a sample (Wilson 1927).

    >>> [round(end, 4) for end in wilson_interval(0.95, 120)]
    [0.8952, 0.9769]
    """
    z = 1.959964
    middle = share + z**2 / (2 * count)
    reach = z * (share * (1 - share) / count + z**2 / (4 * count**2)) ** 0.5
    return (middle - reach) / (1 + z**2 / count), (middle + reach) / (1 + z**2 / count)


def slips_of(area: str) -> list[Slip]:
    """Read the faults to plant in one area."""
    return runpy.run_path(f"{LISTS / area}.py")["SLIPS"]


def read_sources(folder: Path) -> dict[Path, str]:
    """Read the package's files in which faults may be planted: {file: text}."""
    kinds = {".py", ".html", ".txt", ".json"}
    files = [p for p in (folder / "miniclip").rglob("*") if p.suffix in kinds]
    return {file: file.read_text(encoding="utf-8") for file in files}


def places(sources: dict[Path, str], slip: Slip) -> list[Path]:
    """List the files that contain the text `slip.old`, with one entry for each occurrence."""
    return [file for file, text in sources.items() for _ in range(text.count(slip.old))]


def run_all(plan: list[tuple[str, Slip | None]], jobs: int) -> list[str]:
    """Do all runs in `plan`, and return their outcomes. Each job has its own repository copy."""
    git = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(git, cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True).stdout
    with TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        copies: SimpleQueue[Path] = SimpleQueue()
        for copy in (Path(folder, str(job), "miniclip") for job in range(jobs)):
            for name in filter(lambda name: (ROOT / name).is_file(), names.split("\0")):
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, copy / name)
            copies.put(copy)
        runs = pool.map(lambda run: run_planted(copies, *run), plan)
        return [*tqdm(runs, total=len(plan), unit="runs", smoothing=0)]


def run_planted(copies: "SimpleQueue[Path]", tests: str, slip: Slip | None) -> str:
    """Plant the fault, if there is one, in a free copy. Run the tests and return the outcome."""
    copy = copies.get()
    sources = {file: file.read_bytes() for file in places(read_sources(copy), slip)} if slip else {}
    env = os.environ | {"PYTHONPATH": str(copy)}
    env.setdefault("MINICLIP_TEST_DATA", str(ROOT.parent / "shared" / "data"))
    pytest = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", *shlex.split(tests)]
    try:
        for file, source in sources.items():
            write(file, source.replace(slip.old.encode(), slip.new.encode()))
        done = subprocess.run(pytest, cwd=copy, env=env, capture_output=True, timeout=300)
        status = 2 if b"ERROR collecting" in done.stdout else done.returncode
        return {0: "unnoticed", 1: "noticed"}.get(status, "broken")
    except subprocess.TimeoutExpired:
        return "noticed"  # the fault makes a test run forever
    finally:
        for file, source in sources.items():
            write(file, source)
        copies.put(copy)


def write(file: Path, source: bytes) -> None:
    """Write a file. New contents get a new modification time, so that Python notices the change."""
    file.write_bytes(source)
    os.utime(file, 2 * (zlib.crc32(source),))


def table(rows: list[dict[str, str]]) -> str:
    """List unnoticed faults and broken runs, and then each area's share of noticed faults."""
    lines = []
    for row in rows:
        if row["outcome"] != "noticed":
            text = f"{row['outcome']:9}  {row['area']}: {row['what']}  ({row['tests']})"
            lines += textwrap.wrap(text, 80, subsequent_indent=" " * 11)
    kinds = ("noticed", "unnoticed", "broken")
    columns = "{:20}" + 5 * "{:>12}"
    lines += ["", columns.format("area", "slips", *kinds, "share")]
    for area in [*dict.fromkeys(row["area"] for row in rows), "all"]:
        found = [row["outcome"] for row in rows if area in (row["area"], "all")]
        counts = [found.count(kind) for kind in kinds]
        lines.append(columns.format(area, len(found), *counts, f"{counts[0] / len(found):.1%}"))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
