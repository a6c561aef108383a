"""python -m tests.gpu [--minutes 8] [--json FILE]: see --help"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu", description="Is ldm right on this GPU, how fast, how large?"
    )
    parser.add_argument("--minutes", type=float, default=8, help="in all (default: 8)")
    parser.add_argument("--json", type=Path, help="a file for all that was found")
    parser.add_argument("--device", default="cuda", help="cuda (the default), cuda:1, or cpu")
    parser.add_argument("--small", action="store_true", help="toy size: shows that it runs")
    parser.add_argument("--only", help="names of sections, with commas between")
    parser.add_argument("--into", type=Path, help="run nothing: put what --json holds into a page")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from tests.gpu.report import Report, failed, lines, write_into

    if args.into is not None:
        if args.json is None or not args.json.is_file():
            parser.error("--into needs a --json that is there")
        try:
            write_into(args.into, json.loads(args.json.read_text(encoding="utf-8")))
        except (OSError, ValueError, LookupError) as error:
            parser.error(str(error))
        return 0

    if args.minutes <= 0:
        parser.error("--minutes must be above 0")
    from ldm.device import check_device

    try:
        device = check_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    from tests.gpu.fast import sections

    known = {section.__name__: (section, limit) for section, limit in sections()}
    chosen = args.only.split(",") if args.only else list(known)
    if unknown := [name for name in chosen if name not in known]:
        parser.error(f"there is no section {unknown[0]!r}: there are {', '.join(known)}")
    report = Report(device, args.small, 60 * args.minutes, args.json)
    for name in chosen:
        section, limit = known[name]
        report.run(section, limit)
        print(f"{name}: {json.dumps(report.sections[name])[:300]}", file=sys.stderr, flush=True)
    found = report.as_dict()
    print(*lines(found), sep="\n")
    return int(failed(found))


if __name__ == "__main__":
    sys.exit(main())
