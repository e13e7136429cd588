"""Print the table of launch/quickstart.sh from the summary that `iwsft evaluate` has written: quickstart_result.py SUMMARY.json"""

import json
import sys
from pathlib import Path

NAMES = ("base model", "SFT", "iw-SFT")  # in the order in which they were evaluated
WIDTH = 40


def main() -> None:
    summary = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for name, model in zip(NAMES, summary["models"].values(), strict=True):
        mean, low, high = (100 * model["pass@1"][key] for key in ("mean", "low", "high"))
        bar = "█" * round(WIDTH * mean / 100)
        print(f"  {name:<11} {bar:<{WIDTH}} {mean:5.1f} %  [{low:.1f}, {high:.1f}]")
    print()


if __name__ == "__main__":
    main()
